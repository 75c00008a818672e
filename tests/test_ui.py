"""The chat page in a real browser: asking, answering, what is kept, failures, settings and commands."""

import json
import threading

import pytest
from chat_page import NEVER, Reply, end, head, piece, refuses, says, sse
from live_server import wait_until

pytest_plugins = ("chat_browser",)


def test_a_message_is_sent_and_its_answer_streams_in(chat):
    gate = threading.Event()
    chat.send("Hello there", says("Good ", gate, "morning."))
    chat.wait_for("Good")
    assert chat.questions.all_inner_texts() == ["Hello there"]
    assert chat.input.input_value() == ""
    gate.set()
    chat.wait_for("Good morning.")
    chat.wait_until_done()
    (request,) = chat.server.requests
    assert request["messages"] == [{"role": "user", "content": "Hello there"}]
    assert (request["temperature"], request["top_k"], request["max_tokens"], request["stream"]) == (0.8, 50, 512, True)
    assert "12 tokens" in chat.page.locator(".stats").inner_text()
    assert chat.page.locator("#live").inner_text() == "Answer: Good morning."


def test_a_conversation_is_sent_whole_with_the_tool_calls_of_its_answers(chat):
    tool = [{"python": ""}, {"python": "12"}, {"python": "*7"}, {"python_output": ""}, {"python_output": "84"}]
    chat.ask("What is 12*7?", says("Let me see: ", *tool, "84."))
    assert chat.page.locator(".tool summary code").inner_text() == "12*7 = 84"
    assert not chat.page.locator(".tool dd").first.is_visible()
    chat.page.locator(".tool summary").click()
    assert chat.page.locator(".tool dd").all_inner_texts() == ["12*7", "84"]
    chat.ask("Thanks", "Welcome.")
    parts = [("text", "Let me see: "), ("python", "12*7"), ("python_output", "84"), ("text", "84.")]
    assert chat.sent[1] == {"role": "assistant", "content": [{"type": type_, "text": text} for type_, text in parts]}
    assert chat.page.locator(".tool").get_attribute("open") is not None, "a block that was opened stays open"


def test_characters_and_lines_cut_in_the_stream_arrive_whole(chat):
    text, steps = "naïve 東京 👩‍🚀 é", []
    for byte in (head() + piece(text) + end()).replace("\n", "\r\n").encode():
        steps += [bytes([byte])] if byte < 128 else [0.02, bytes([byte]), 0.02]
    chat.ask("Go", Reply(steps))
    assert chat.answers.inner_text() == text


def test_an_answer_that_was_stopped_or_cut_by_its_limit_can_be_continued(chat):
    chat.send("Tell me a story", says("Once upon a time", NEVER))
    chat.wait_for("Once upon a time")
    chat.click("Stop the answer")
    chat.wait_for("Stopped.")
    wait_until(lambda: chat.server.num_disconnects == 1)
    assert chat.answers.inner_text() == "Once upon a time"
    chat.click("Continue", says(" there was", finish_reason="length"))
    chat.wait_for("Length limit reached.")
    assert chat.sent[-1] == {"role": "assistant", "content": "Once upon a time"}
    chat.click("Continue", says(" a fox."))
    chat.wait_for("a fox.")
    chat.wait_until_done()
    assert chat.answers.inner_text() == "Once upon a time there was a fox."
    assert chat.button("Continue").count() == 0
    chat.send("Another story", says("Long ago", NEVER))
    chat.wait_for("Long ago")
    chat.page.keyboard.press("Escape")  # does the same as the button
    chat.wait_for("Stopped.")
    wait_until(lambda: chat.server.num_disconnects == 2)


def test_a_question_is_edited_and_sent_again_and_that_can_be_undone(chat):
    chat.ask("First", "Answer one")
    chat.input.press("ArrowUp")
    editor = chat.label("Edit the message")
    editor.fill("other")
    chat.page.keyboard.press("Escape")  # leaves the editor
    editor.wait_for(state="detached")
    assert chat.questions.all_inner_texts() == ["First"]
    assert chat.input.evaluate("node => node === document.activeElement")
    chat.ask("Second", "Answer two")
    chat.questions.first.hover()
    chat.button("Edit the message and send it again").first.click()
    assert editor.input_value() == "First"
    editor.fill("First, mended")
    chat.server.script.append(says("Answer three"))
    editor.press("Enter")
    chat.wait_for("Answer three")
    chat.wait_until_done()
    assert chat.sent == [{"role": "user", "content": "First, mended"}]
    assert chat.answers.all_inner_texts() == ["Answer three"]
    assert chat.page.locator(".row").all_inner_texts() == ["First, mended"]
    chat.click("Undo")
    chat.wait_for("Answer two")
    assert chat.questions.all_inner_texts() == ["First", "Second"]
    assert chat.page.locator(".row").all_inner_texts() == ["First"]


def test_regenerating_keeps_the_earlier_versions(chat):
    chat.ask("Name a colour", "Red")
    chat.click("Answer again", says("Turquoise"))
    chat.wait_for("Turquoise")
    chat.wait_until_done()
    assert chat.sent == [{"role": "user", "content": "Name a colour"}]
    chat.click("Earlier version")
    chat.wait_for("Red")
    assert chat.page.locator(".count").inner_text() == "1/2"
    chat.ask("Why?", "Because.")
    assert chat.sent[1] == {"role": "assistant", "content": "Red"}, "what is shown is sent"


def test_two_conversations_answer_at_once_without_mixing(chat):
    gates = threading.Event(), threading.Event()
    chat.send("One", says("alpha ", gates[0], "beta"))
    chat.wait_for("alpha")
    chat.click("New chat")
    chat.send("Two", says("gamma ", gates[1], "delta"))
    chat.wait_for("gamma")
    gates[0].set()
    chat.until("state.replies.size === 1")
    gates[1].set()
    chat.wait_until_done()
    assert chat.answers.all_inner_texts() == ["gamma delta"]
    chat.click("One", exact=True)
    chat.wait_for("alpha beta")
    assert chat.answers.all_inner_texts() == ["alpha beta"]


def test_enter_sends_but_not_with_shift_nor_while_composing(chat):
    chat.input.fill("first line")
    chat.input.press("Shift+Enter")
    chat.page.keyboard.type("second line")
    chat.input.evaluate(
        "node => node.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))"
    )
    assert chat.server.requests == []
    chat.server.script.append(says("ok"))
    chat.input.press("Enter")
    chat.wait_until_done()
    assert chat.sent[0]["content"] == "first line\nsecond line"


def test_reloading_keeps_conversations_and_settings(chat):
    chat.ask("Remember the **moon**", "I *will*.")
    chat.command("/temperature 0.3")
    chat.click("New chat")
    chat.ask("Another", "Yes.")
    chat.page.reload()
    chat.wait_for("Yes.")
    chat.click("Remember the **moon**", exact=True)
    chat.wait_for("I will.")
    assert chat.questions.inner_text() == "Remember the **moon**"
    chat.ask("And now?", "Still.")
    assert chat.server.requests[-1]["temperature"] == 0.3
    assert [message["role"] for message in chat.sent] == ["user", "assistant", "user"]


def test_reloading_in_the_middle_of_an_answer_keeps_what_had_come(chat):
    chat.send("Tell me", says("It began", NEVER))
    chat.wait_for("It began")
    chat.page.reload()
    chat.wait_for("Stopped.")
    assert chat.answers.inner_text() == "It began"
    assert chat.button("Continue").is_visible()


def test_an_export_imports_as_the_same_conversations_once(chat, open_chat, tmp_path):
    chat.command("/system Be brief.")
    chat.ask("Sum?", says({"python": ""}, {"python": "1+1"}, {"python_output": ""}, {"python_output": "2"}, "Two."))
    with chat.page.expect_download() as download:
        chat.click("Export")
    path = tmp_path / "export.json"
    download.value.save_as(path)
    (exported,) = json.loads(path.read_text())["conversations"]
    assert exported["messages"][0] == {"role": "system", "content": "Be brief."}
    other = open_chat()
    for expected in ("1 conversation imported.", "0 conversations imported, 1 already here."):
        other.label("File of conversations").set_input_files(path)
        other.wait_for(expected)
    other.click("Sum?", exact=True)
    other.ask("More?", "No.")
    assert other.sent == [*exported["messages"], {"role": "user", "content": "More?"}]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not json", "holds no conversations"), ('{"a": 1}', "holds no conversations"),
        ('[{"messages": []}]', "1 refused: conversation 1 has no messages"),
        ('[{"messages": [{"role": "assistant", "content": "x"}]}]', "1 refused: conversation 1 has the role"),
        ('[{"messages": [{"role": "user", "content": {}}]}, null]', "2 refused: conversation 1 has a question"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n[{"role": "user", "content": "b"}]\n',
         "2 conversations imported."),
    ],
)  # fmt: skip
def test_an_import_says_what_it_refuses(chat, tmp_path, text, words):
    path = tmp_path / "file.jsonl"
    path.write_text(text)
    chat.label("File of conversations").set_input_files(path)
    chat.wait_for(words)


def test_a_conversation_is_renamed_and_comes_back_by_undo_when_deleted(chat):
    chat.ask("Old name", "Yes.")
    chat.button("Old name", exact=True).hover()
    chat.click("Rename Old name")
    chat.label("Title").fill("New name")
    chat.page.keyboard.press("Enter")
    chat.button("New name", exact=True).hover()
    assert chat.page.title() == "New name · nanochat"
    chat.click("Delete New name")
    chat.wait_for("No conversations yet")
    assert chat.page.evaluate("Object.keys(localStorage).filter((key) => key.startsWith(PREFIX))") == []
    chat.click("Undo")
    chat.wait_for("Yes.")
    chat.page.reload()
    chat.wait_for("Yes.")


def test_two_tabs_do_not_overwrite_each_other(chat, open_chat):
    other = open_chat(context=chat.page.context)
    chat.ask("From one tab", "One.")
    other.ask("From the other tab", "Two.")
    for tab in (chat, other):
        tab.button("From one tab", exact=True).wait_for()
        tab.button("From the other tab", exact=True).wait_for()


def test_what_is_no_conversation_in_the_storage_is_left_alone(chat):
    chat.ask("Kept", "Yes.")
    for i, text in enumerate(("", "{", "null", "{}", '{"messages": [{}, {}]}', '{"messages": [{"text": "half"}]}')):
        chat.page.evaluate("([i, text]) => localStorage.setItem(PREFIX + i, text)", [i, text])
    chat.page.reload()
    chat.wait_for("Yes.")
    assert chat.page.locator(".row").all_inner_texts() == ["Kept"]
    assert chat.page.evaluate("localStorage.getItem(PREFIX + 1)") == "{"


def test_full_storage_is_said_and_the_conversation_goes_on(chat):
    chat.page.evaluate(
        "void (Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); })"
    )
    chat.input.evaluate("node => node.value = 'Hello'")
    chat.server.script.append(says("Hi."))
    chat.button("Send", exact=True).evaluate("node => node.form.requestSubmit()")
    chat.wait_for("The browser's storage is full")
    chat.wait_for("Hi.")


def test_the_page_is_usable_where_the_browser_refuses_storage(open_chat, browser):
    context = browser.new_context()
    context.add_init_script(
        "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no', 'SecurityError'); }})"
    )
    chat = open_chat(context=context)
    chat.ask("Hello", "Hi.")
    assert chat.answers.inner_text() == "Hi."
    context.close()


# --- when things go wrong ------------------------------------------------------------------------

FAILURES = {
    "queue full": (refuses(429, "full", "queue_full", **{"Retry-After": "7"}), "Try again in about 7 seconds."),
    "context": (refuses(400, "It has 3000 tokens.", "context_length_exceeded"), "The message is too long."),
    "refused": (refuses(400, "top_k must be at least 0"), "top_k must be at least 0"),
    "html": (Reply(["<html>bad gateway</html>"], 502), "The server answered with status 502."),
    "broken": (Reply([head(), piece("Well")]), "The answer was cut off."),
    "empty": (Reply([]), "The answer was cut off."),
    "in the stream": (Reply([head(), sse(error={"message": "worker stopped", "code": None})]), "worker stopped"),
    "no json": (Reply(["data: {oops\n\n"]), "The answer could not be read."),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_said_in_words_and_can_be_retried(chat, name):
    reply, words = FAILURES[name]
    chat.send("Hello", reply)
    chat.alert.get_by_text(words).wait_for()
    chat.click("Retry", says("There you are."))
    chat.wait_for("There you are.")
    chat.wait_until_done()
    assert chat.alert.count() == 0
    assert chat.sent == [{"role": "user", "content": "Hello"}]


def test_a_server_that_is_gone_is_said_and_noticed_when_it_is_back(chat):
    for path in ("**/v1/**", "**/health"):
        chat.page.route(path, lambda route: route.abort("connectionrefused"))
    chat.send("Hello")
    chat.alert.get_by_text("The server cannot be reached.").wait_for()
    chat.page.locator("#server-note").get_by_text("Retrying").wait_for()
    chat.page.unroute_all()
    chat.page.evaluate("checkHealth()")
    chat.page.locator("#server-note").wait_for(state="hidden")
    chat.ask("Found", "Yes.")
    assert chat.sent == [{"role": "user", "content": "Found"}], "a question without an answer is left out"


def test_the_key_is_asked_for_and_the_message_sent_again_with_it(chat):
    chat.server.key = "sesame"
    chat.send("Hello", says("Welcome."))
    field = chat.page.get_by_role("dialog").get_by_label("API key")
    field.fill("sesame")
    field.press("Enter")
    chat.wait_for("Welcome.")
    assert "sesame" not in chat.page.evaluate("JSON.stringify({...localStorage})")
    chat.page.reload()
    chat.ask("Again", "Still known.")
    assert chat.answers.all_inner_texts()[-1] == "Still known."


def test_a_message_written_while_the_model_loads_is_answered_when_it_is_ready_and_a_failure_is_said(open_chat, server):
    server.health["status"] = "loading"
    chat = open_chat()
    chat.wait_for("The model is loading.")
    chat.send("Early", says("Now I am here."))
    chat.wait_for("Waiting for the model to load")
    assert server.requests == []
    server.script.appendleft(refuses(503, "still loading", "model_loading"))
    server.health["status"] = "ok"
    chat.wait_for("Now I am here.")
    chat.page.locator("#server-note").wait_for(state="hidden")
    server.health.update(status="failed", message="no checkpoint in the folder")
    open_chat().wait_for("The model could not be loaded: no checkpoint in the folder")


def test_dropped_messages_are_said_and_marked_and_the_meter_shows_the_context(chat):
    for i in range(3):
        chat.ask(f"Question {i}", f"Answer {i}")
    chat.ask("Question 3", says("Answer 3", num_dropped=4, used=1900))
    chat.wait_for(
        "The conversation is longer than the context of 2,048 tokens: the model did not see the oldest 4 messages."
    )
    order = chat.page.locator("#transcript > *").evaluate_all("nodes => nodes.map((node) => node.className)")
    assert order.index("divider") == 4
    assert chat.page.locator("#meter").inner_text().strip() == "1,900 of 2,048 tokens"
    assert "full" in chat.page.locator("#meter").get_attribute("class")


def test_settings_are_checked_kept_and_sent(chat):
    chat.click("Settings")
    page = chat.page
    chat.label("Temperature").fill("3")
    page.get_by_text("The temperature must be a number from 0 to 2.").wait_for()
    chat.label("Temperature").fill("0.25")
    for label, value in (("Top-k", "7"), ("Longest answer", "99"), ("System prompt", "Speak like a pirate.")):
        page.get_by_label(label).fill(value)
    page.get_by_role("group", name="Colours").get_by_text("Dark").click()
    chat.click("Done")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.reload()
    chat.ask("Hello", "Arr.")
    request = chat.server.requests[0]
    assert (request["temperature"], request["top_k"], request["max_tokens"]) == (0.25, 7, 99)
    assert request["messages"][0] == {"role": "system", "content": "Speak like a pirate."}


def test_commands_are_offered_completed_and_run(chat):
    chat.input.fill("/t")
    options = chat.page.get_by_role("option")
    options.first.wait_for()
    assert [text.split()[0] for text in options.all_inner_texts()] == ["/temperature", "/topk"]
    chat.input.press("ArrowDown")
    chat.input.press("Enter")
    assert chat.input.input_value() == "/topk "
    chat.page.keyboard.type("5")
    chat.input.press("Enter")
    chat.wait_for("The top-k is now 5.")
    for command, words in (("/max 0", "must be a whole number from 1"), ("/nonsense", "Unknown command /nonsense;")):
        chat.command(command)
        chat.wait_for(words)
    assert chat.input.input_value() == "/nonsense"
    chat.ask(" /nonsense", "ok")
    assert chat.sent[0]["content"] == "/nonsense"
    chat.command("/help")
    assert chat.page.get_by_role("dialog").is_visible()
