"""SGLang's OpenAI and Anthropic routes over sessions that their clients know nothing of."""
