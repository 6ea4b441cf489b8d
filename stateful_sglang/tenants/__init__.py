"""Who may use a server, and what of it: keys, tenants, their salts and limits.

Pure: the HTTP side (`api/guard/`) asks `Keys` who a request comes from and says so in `acting_as`;
whatever runs for that request finds it in `current`.
"""

from stateful_sglang.tenants.identity import ALONE, NOBODY, SERVER, Identity, acting_as, current
from stateful_sglang.tenants.in_flight import InFlight, OverLimitError
from stateful_sglang.tenants.keys import Keys
from stateful_sglang.tenants.keys_file import KeysError
from stateful_sglang.tenants.limits import TenantLimits

__all__ = [
    "ALONE",
    "NOBODY",
    "SERVER",
    "Identity",
    "InFlight",
    "Keys",
    "KeysError",
    "OverLimitError",
    "TenantLimits",
    "acting_as",
    "current",
]
