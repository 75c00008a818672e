"""Talking to a model: OpenAI's HTTP API with a chat page, and a chat in the terminal.

Begin with `api.py`: the application and its routes. `schema.py` checks a request, `messages.py` brings the messages in
it into the one order that the model knows, the processes of `worker.py` generate the replies, and `answers.py` puts
them into OpenAI's format. All routes share `middleware.py` (who may call, limits, access log, metrics) and `errors.py`
(faults as clients see them). `ui.html` is the chat page, with `prism.js` (by others) for the colours of code in it;
`terminal.py` is the chat in a terminal, and `console.py` its interactive side: editing lines, rendering Markdown.

Not here: flags and starting the server (`scripts/chat_web.py`, `scripts/chat_cli.py`).
"""
