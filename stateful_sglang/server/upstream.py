"""What starting a server counts on in SGLang: its launcher, its arguments, its processes."""

from __future__ import annotations

from stateful_sglang.attachments.check import Attachment

ATTACHMENTS = (
    Attachment(
        "sglang.srt.entrypoints.http_server.launch_server",
        "relies",
        "starts the server with processes and a tokenizer manager of ours",
    ),
    Attachment(
        "sglang.srt.entrypoints.http_server.app",
        "relies",
        "the application that our routes are added to",
    ),
    Attachment(
        "sglang.srt.entrypoints.http_server.get_global_state",
        "relies",
        "the tokenizer manager, once there is one",
    ),
    Attachment(
        "sglang.srt.utils.common.kill_process_tree",
        "relies",
        "ends the processes that the server has started",
    ),
    Attachment(
        "sglang.srt.managers.scheduler.run_scheduler_process",
        "relies",
        "what a scheduler's process runs once our platform is there",
    ),
    Attachment(
        "sglang.srt.managers.detokenizer_manager.run_detokenizer_process",
        "relies",
        "what the detokenizer's process runs once our platform is there",
    ),
    Attachment(
        "sglang.srt.plugins.load_plugins",
        "registry",
        "our plugin attaches before SGLang reads its arguments",
    ),
    Attachment(
        "sglang.srt.server_args.ServerArgs.add_cli_args",
        "relies",
        "which arguments the user gave, by SGLang's own parser",
    ),
    Attachment(
        "sglang.srt.server_args.prepare_server_args",
        "relies",
        "makes SGLang's settings of the whole command line",
    ),
    Attachment(
        "sglang.srt.utils.server_args_config_parser.ConfigArgumentMerger",
        "relies",
        "a --config file says what the command line may",
    ),
    Attachment(
        "sglang.srt.configs.model_config.is_generation_model",
        "relies",
        "which models SGLang serves as ones that generate",
    ),
)
