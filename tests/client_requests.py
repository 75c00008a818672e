"""Requests as programs send them to an OpenAI-compatible server: path and body by name, all asking "What is 2 + 3?".

Written from the programs' documentation and from what they were seen to send, and shortened. Used by `test_clients.py`,
and with a real model by `dev/check_clients.py`.
"""

from typing import Any

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
QUESTION = "What is 2 + 3?"


def message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def part(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


USER = message("user", QUESTION)
CHAT_HISTORY = f"<chat_history>\nUSER: {QUESTION}\n</chat_history>"
EARLIER = [message("user", "Hello!"), message("assistant", "Hello! How can I help?")]
IDENTITY = {"session_id": "VDj2iVTvLJ", "chat_id": "5b1c3c52", "id": "0d9e0b1f"}

REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "Open WebUI, chat": (CHAT, {
        "stream": True, "model": "", "messages": [*EARLIER, USER], "params": {}, "files": [], "tool_servers": [],
        "features": {"image_generation": False, "code_interpreter": False, "web_search": False, "memory": False},
        "variables": {"{{USER_NAME}}": "me", "{{CURRENT_DATE}}": "2026-11-28"}, **IDENTITY,
        "model_item": {"id": "nanochat", "object": "model", "owned_by": "openai", "info": {"meta": {}}},
        "background_tasks": {"title_generation": True, "tags_generation": True, "follow_up_generation": False},
        "stream_options": {"include_usage": True},
    }),
    "Open WebUI, after an aborted reply": (CHAT, {
        "stream": True, "messages": [message("user", "Hello!"), message("assistant", ""), USER], "tool_ids": None,
        "metadata": {"task": None, "user_id": "u", "function_calling": "default"},
    }),
    "Open WebUI, title": (CHAT, {
        "messages": [message("user", f"### Task:\nGenerate a title.\n{CHAT_HISTORY}")],
        "stream": False, "max_completion_tokens": 1000,
        "metadata": {"task": "title_generation", "chat_id": "5b1c3c52", "task_body": {"model": "nanochat"}},
    }),
    "Open WebUI, tags": (CHAT, {
        "messages": [message("user", f"### Task:\nGenerate 1-3 tags.\n{CHAT_HISTORY}")],
        "stream": False, "metadata": {"task": "tags_generation", "chat_id": "5b1c3c52"},
    }),
    "LibreChat": (CHAT, {
        "model": "default", "user": "65f0c0ffee", "temperature": 1, "top_p": 1, "presence_penalty": 0,
        "frequency_penalty": 0, "stream": True, "stream_options": {"include_usage": True},
        "messages": [message("system", "Instructions: answer."), *EARLIER, message("user", part(QUESTION), name="me")],
    }),
    "SillyTavern": (CHAT, {
        "messages": [
            message("system", "Write the assistant's next reply."), message("system", "[Start a new Chat]"),
            message("assistant", "Welcome, traveller!"), USER, message("system", "Stay in character."),
        ],
        "model": "nanochat", "temperature": 1, "frequency_penalty": 0, "presence_penalty": 0, "top_p": 1,
        "max_tokens": 60, "stream": True, "logit_bias": {}, "stop": [], "chat_completion_source": "custom",
        "user_name": "User", "char_name": "Assistant", "group_names": [], "include_reasoning": True,
        "reasoning_effort": "auto", "enable_web_search": False, "request_images": False,
        "custom_prompt_post_processing": "", "seed": 7, "n": 1,
    }),
    "SillyTavern, text completion": (COMPLETION, {
        "prompt": QUESTION, "max_new_tokens": 40, "max_tokens": 40, "temperature": 0.7, "top_p": 0.9, "typical_p": 1,
        "min_p": 0, "repetition_penalty": 1.1, "frequency_penalty": 0, "presence_penalty": 0, "top_k": -1,
        "skew": 0, "min_tokens": 0, "add_bos_token": True, "truncation_length": 256, "ban_eos_token": False,
        "skip_special_tokens": True, "stop": ["\nUser:", "\nAssistant:"], "stopping_strings": ["\nUser:"],
        "mirostat_mode": 0, "grammar_string": "", "json_schema": {}, "custom_token_bans": "", "sampler_order": [],
        "dry_multiplier": 0, "xtc_probability": 0, "nsigma": 0, "n": 1, "seed": 7, "stream": True, "api_type": "vllm",
    }),
    "Continue": (CHAT, {
        "messages": [message("system", "You are in chat mode."), message("user", part("Look at this."), id="1"),
                     message("user", part(QUESTION))],
        "model": "nanochat", "max_tokens": 4096, "stream": True, "stop": ["<|im_end|>", "<|im_start|>"],
        "stream_options": {"include_usage": True}, "parallel_tool_calls": False,
    }),
    "llama.cpp's page": (CHAT, {
        "messages": [USER], "stream": True, "cache_prompt": True, "reasoning_format": "none", "samplers": "edkypmxt",
        "temperature": 0.8, "dynatemp_range": 0, "dynatemp_exponent": 1, "top_k": 40, "top_p": 0.95, "min_p": 0.05,
        "typical_p": 1, "xtc_probability": 0, "xtc_threshold": 0.1, "repeat_last_n": 64, "repeat_penalty": 1,
        "presence_penalty": 0, "frequency_penalty": 0, "max_tokens": 100, "timings_per_token": True,
    }),
    "LangChain": (CHAT, {
        "messages": [message("developer", "Be brief."), USER], "model": "nanochat", "temperature": 0.7, "stream": False,
        "max_completion_tokens": 100, "tools": [], "tool_choice": "auto", "response_format": {"type": "text"},
        "logprobs": False, "top_logprobs": None, "n": 1, "store": False, "service_tier": None,
    }),
    "Vercel's AI SDK": (CHAT, {
        "model": "nanochat", "max_tokens": 100, "temperature": 0, "messages": [message("user", part(QUESTION))],
        "stream": True, "stream_options": {"include_usage": True}, "tools": [], "verbosity": "low",
    }),
    "vLLM's benchmark": (COMPLETION, {
        "model": "nanochat", "prompt": QUESTION, "temperature": 0.0, "best_of": 1, "repetition_penalty": 1.0,
        "max_tokens": 20, "logprobs": None, "stream": True, "stream_options": {"include_usage": True},
        "ignore_eos": False,
    }),
    "lm-evaluation-harness": (COMPLETION, {
        "model": "nanochat", "prompt": [[72, 105, 33], [72, 105]], "temperature": 0, "max_tokens": 1, "logprobs": 1,
        "seed": 1234, "echo": True,
    }),
}  # fmt: skip
