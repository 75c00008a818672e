"""The chat page in a real browser: asking, answering, what is kept, failures, settings and commands."""

import json
import threading

import pytest
from chat_page import NEVER, Reply, end, head, piece, refuses, says, sse
from live_server import wait_until

from nanochat.engine.sampling import CHAT_TEMPERATURE, CHAT_TOP_K

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
    assert (request["temperature"], request["top_k"]) == (CHAT_TEMPERATURE, CHAT_TOP_K), "as in the terminal"
    assert (request["max_tokens"], request["stream"]) == (512, True)
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


def test_a_question_that_is_edited_keeps_its_earlier_version_with_what_followed(chat):
    chat.ask("First", "Answer one")
    chat.input.press("ArrowUp")
    editor = chat.label("Edit the message")
    editor.fill("other")
    chat.page.keyboard.press("Escape")  # leaves the editor
    editor.wait_for(state="detached")
    assert chat.questions.all_inner_texts() == ["First"]
    assert chat.input.evaluate("node => node === document.activeElement")
    chat.ask("Second", "Answer two")
    chat.edit(0, "First, mended", "Answer three")
    assert chat.sent == [{"role": "user", "content": "First, mended"}]
    assert chat.texts == ["First, mended", "Answer three"]
    assert chat.page.locator(".row").all_inner_texts() == ["First, mended"]
    chat.ask("Third", "Answer four")
    chat.click("Earlier version")
    chat.wait_for("Answer two")
    assert chat.texts == ["First", "Answer one", "Second", "Answer two"]
    assert chat.page.locator(".count").all_inner_texts() == ["1 / 2"]
    chat.ask("Fourth", "Answer five")
    assert [message["content"] for message in chat.sent[::2]] == ["First", "Second", "Fourth"]
    chat.page.reload()
    chat.click("Later version")
    chat.wait_for("Answer four")
    assert chat.texts == ["First, mended", "Answer three", "Third", "Answer four"]
    assert chat.button("Later version").evaluate(
        "node => node.ariaDisabled === 'true' && node === document.activeElement"
    )
    assert chat.button("Earlier version").evaluate("node => node.ariaDisabled") == "false"


def test_answering_again_keeps_the_earlier_versions_and_what_followed_them(chat):
    chat.ask("Name a colour", "Red")
    chat.click("Answer again", says("Turquoise"))
    chat.wait_for("Turquoise")
    chat.wait_until_done()
    assert chat.sent == [{"role": "user", "content": "Name a colour"}]
    chat.click("Earlier version")
    chat.wait_for("Red")
    assert chat.page.locator(".count").inner_text() == "1 / 2"
    chat.ask("Why?", "Because.")
    assert chat.sent[1] == {"role": "assistant", "content": "Red"}, "what is shown is sent"
    chat.click("Later version")
    chat.wait_for("Turquoise")
    assert chat.texts == ["Name a colour", "Turquoise"]
    chat.click("Earlier version")
    chat.wait_for("Because.")
    chat.server.script.append(says("Blue"))
    chat.button("Answer again").first.click()  # of an answer that others follow
    chat.wait_for("Blue")
    chat.wait_until_done()
    assert chat.texts == ["Name a colour", "Blue"]
    assert chat.page.locator(".count").inner_text() == "3 / 3"


def test_versions_are_not_turned_while_an_answer_comes_in(chat):
    gate = threading.Event()
    chat.ask("One", "Two")
    chat.edit(0, "Three", says("Fo", gate, "ur"), wait=False)
    chat.wait_for("Fo")
    chat.button("Earlier version").dispatch_event("click")
    assert chat.button("Earlier version").evaluate("node => node.ariaDisabled") == "true"
    assert chat.texts == ["Three", "Fo"]
    gate.set()
    chat.wait_until_done()
    chat.click("Earlier version")
    chat.wait_for("Two")


def test_chats_that_an_earlier_page_stored_are_loaded(chat):
    answers = [{"parts": [{"type": "text", "text": text}], "meta": {"finish": "stop"}} for text in ("Red", "Blue")]
    messages = [
        {"role": "user", "text": "A colour?"}, {"role": "assistant", "versions": answers, "shown": 0},
        {"role": "user", "text": "Why?"}, {"role": "assistant", "versions": answers[:1], "shown": 0},
    ]  # fmt: skip
    old = {"id": "old", "title": "Old chat", "system": "", "updated": 1.7e12, "messages": messages}
    settings = {"temperature": 0.8, "topK": 7, "maxTokens": 512, "system": "", "theme": "dark"}
    store = "([key, value]) => localStorage.setItem(key, JSON.stringify(value))"
    chat.page.evaluate(store, ["nanochat.conversation.old", old])
    chat.page.evaluate(store, ["nanochat.settings", settings])
    chat.page.reload()
    chat.click("Old chat", exact=True)
    chat.wait_for("Why?")
    assert chat.texts == ["A colour?", "Red", "Why?", "Red"]
    chat.click("Later version")
    chat.wait_for("Blue")
    chat.ask("And now?", "Yes.")
    assert [message["content"] for message in chat.sent] == ["A colour?", "Blue", "And now?"]
    request = chat.server.requests[-1]
    assert (request["temperature"], request["top_k"]) == (0.6, 7), "what was chosen stays, a former default does not"


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


def test_an_export_holds_all_branches(chat, open_chat, tmp_path):
    chat.ask("One", "a")
    chat.ask("Two", "b")
    chat.edit(0, "One, mended", "c")
    chat.click("Answer again", says("d"))
    chat.wait_for("d")
    chat.wait_until_done()
    with chat.page.expect_download() as download:
        chat.click("Export")
    path = tmp_path / "export.json"
    download.value.save_as(path)
    (exported,) = json.loads(path.read_text())["conversations"]
    assert exported["messages"] == [{"role": "user", "content": "One, mended"}, {"role": "assistant", "content": "d"}]
    former = {key: value for key, value in exported.items() if key != "branches"}
    (tmp_path / "former.json").write_text(json.dumps([former]))
    for known in (path, tmp_path / "former.json"):
        chat.label("File of conversations").set_input_files(known)
        chat.wait_for("1 already here")
        chat.click("Dismiss")
    other = open_chat()
    other.label("File of conversations").set_input_files(path)
    other.click("One, mended", exact=True)
    other.wait_for("d")
    assert other.page.locator(".count").all_inner_texts() == ["2 / 2", "2 / 2"]
    other.button("Earlier version").first.click()
    other.wait_for("Two")
    assert other.texts == ["One", "a", "Two", "b"]


def test_a_chat_is_saved_as_markdown(chat, tmp_path):
    chat.command("/system Be brief.")
    tool = [{"python": ""}, {"python": "12*7"}, {"python_output": ""}, {"python_output": "84"}]
    chat.ask("What is 12*7?", says("Let me see:\n", *tool, "It is **84**."))
    chat.click("Menu of What is 12*7?")
    with chat.page.expect_download() as download:
        chat.page.get_by_role("menuitem", name="Save as Markdown").click()
    assert download.value.suggested_filename == "What-is-12-7.md"
    download.value.save_as(tmp_path / "chat.md")
    title, date, *rest = (tmp_path / "chat.md").read_text().rstrip().split("\n\n")
    assert title == "# What is 12*7?"
    assert date[0] == date[-1] == "*"
    assert rest == [
        "> System prompt: Be brief.", "## You", "What is 12*7?", "## nanochat", "Let me see:", "Calculator:",
        "    12*7 = 84", "It is **84**.",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not json", "holds no conversations"), ('{"a": 1}', "holds no conversations"),
        ('[{"messages": []}]', "1 refused: conversation 1 has no messages"),
        ('[{"messages": [{"role": "assistant", "content": "x"}]}]', "1 refused: conversation 1 has the role"),
        ('[{"messages": [{"role": "user", "content": {}}]}, null]', "2 refused: conversation 1 has a question"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n[{"role": "user", "content": "b"}]\n',
         "2 conversations imported."),
        ('[{"messages": [], "branches": [{"role": "user", "shown": 1, "versions": [{"content": "a"}]}]}]',
         "1 refused: conversation 1 has a message without the version to show"),
        ('[{"messages": [], "branches": [{"role": "user", "shown": "0", "versions": [{"content": "a"}]}]}]',
         "1 refused: conversation 1 has a message without the version to show"),
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
    chat.click("Menu of Old name")
    chat.page.get_by_role("menuitem", name="Rename").click()
    chat.label("Title").fill("New name")
    chat.page.keyboard.press("Enter")
    chat.until("document.title === 'New name · nanochat'")
    chat.button("Menu of New name").focus()
    chat.page.keyboard.press("Enter")
    chat.page.keyboard.press("Escape")
    assert chat.button("Menu of New name").evaluate("node => node === document.activeElement")
    for key in ("Enter", "ArrowUp", "Enter"):  # the last one is Delete
        chat.page.keyboard.press(key)
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


def test_numbers_come_from_the_models_card_and_never_exceed_it(open_chat, server):
    server.card = {"context": 256, "max_tokens": 200, "temperature": 0.9, "top_k": 40}
    chat = open_chat()
    chat.until("state.card.context === 256")
    chat.ask("Hello", "Hi.")
    asked = ("temperature", "top_k", "max_tokens")
    assert [server.requests[-1][name] for name in asked] == [0.9, 40, 200]
    chat.click("Settings")
    chat.wait_for("It shares the context of 256 tokens with the conversation.")
    assert chat.label("Longest answer").input_value() == "200"
    chat.label("Longest answer").fill("512")
    chat.wait_for("The longest answer must be a whole number from 1 to 200.")
    chat.label("Longest answer").fill("150")
    chat.label("Temperature").fill("0.1")
    chat.click("Done")
    chat.ask("Hello", "Hi.")
    assert [server.requests[-1][name] for name in asked] == [0.1, 40, 150]
    server.card["max_tokens"] = 100
    chat.page.reload()
    chat.until("state.card.max_tokens === 100")
    chat.ask("Hello", "Hi.")
    assert [server.requests[-1][name] for name in asked] == [0.1, 40, 100]
    chat.click("Settings")
    chat.click("Restore defaults")
    assert chat.label("Temperature").input_value() == "0.9"


def test_the_models_name_opens_what_is_known_of_it(open_chat, server):
    server.card = {"context": 256, "max_tokens": 200, "stage": "rl", "step": 1200, "parameters": 4_200_000}
    for options in ({}, {"width": 390, "height": 844, "has_touch": True, "is_mobile": True}):
        chat = open_chat(**options)
        chat.until("state.card.context === 256")
        chat.click("nanochat-d4")
        known = chat.page.get_by_role("dialog", name="nanochat-d4").locator("dd").all_inner_texts()
        assert known == ["Reinforcement learning", "1,200", "4.2 million", "256 tokens", "200 tokens"]
    server.card = None  # as an older server
    chat = open_chat()
    chat.click("nanochat-d4")
    chat.wait_for("The server says no more about it.")


def test_the_card_of_a_server_with_a_key_is_read_once_the_key_is_known(chat):
    chat.server.key, chat.server.card = "sesame", {"examples": ["What is 2+2?"]}
    chat.page.reload()
    chat.click("Settings")
    chat.page.get_by_role("textbox", name="API key").fill("sesame")
    chat.click("Done")
    chat.button("What is 2+2?").wait_for()


def test_examples_are_those_of_the_model(open_chat, server):
    chat = open_chat()
    chat.wait_for("What would you like to talk about?")
    assert chat.page.locator("#examples button").count() == 0
    server.card = {"examples": ["Who are you?", "2+2", "What <b>is</b> it?", "a" * 900, "a fifth"]}
    chat.page.reload()
    chat.button("Who are you?").wait_for()
    assert chat.page.locator("#examples button").all_inner_texts() == server.card["examples"][:4]
    server.script.append(says("I am nanochat."))
    chat.click("Who are you?")
    chat.wait_for("I am nanochat.")
    assert chat.sent == [{"role": "user", "content": "Who are you?"}]


def test_speed_and_time_to_the_first_token_are_shown_and_kept(chat):
    texts = [part for _ in range(5) for part in (piece("word "), 0.1)]
    chat.send("Go", Reply([head(), 0.3, *texts, end("length", num_tokens=5)]))
    stats = chat.page.locator(".stats")
    stats.wait_for()
    tokens, rate, first = stats.inner_text().split(" · ")
    assert tokens == "5 tokens"
    assert 2 < float(rate.removesuffix(" tokens/s")) <= 10
    assert 0.3 <= float(first.removeprefix("first token after ").removesuffix(" s")) < 3
    chat.page.reload()
    chat.wait_for(first)
    chat.click("Continue", Reply([head(), 0.6, piece("more "), 1.0, piece("words"), end(num_tokens=2)]))
    chat.wait_for("7 tokens")
    _, slower, same = stats.inner_text().split(" · ")
    assert float(slower.removesuffix(" tokens/s")) < float(rate.removesuffix(" tokens/s"))
    assert same == first, "the first token of the whole answer"


def test_a_search_over_chats_and_commands_is_used_by_keyboard(chat):
    for i in range(3):
        chat.ask(f"Question {i}", f"The answer is {i * 111}.")
        chat.click("New chat")
    field, options = chat.page.get_by_role("combobox", name="Search"), chat.page.get_by_role("option")
    chat.page.keyboard.press("Control+k")
    assert field.evaluate("node => node === document.activeElement")
    assert options.first.inner_text().startswith("Question 2")
    for _ in range(3):  # the dialog keeps the focus
        chat.page.keyboard.press("Tab")
        assert chat.page.evaluate("!document.activeElement.closest('#sidebar, #main')")
    field.fill("ANSWER 111")
    assert options.count() == 1
    assert "The answer is 111." in options.inner_text()
    field.press("Enter")
    chat.wait_for("The answer is 111.")
    chat.page.keyboard.press("Control+k")
    field.fill("settings")
    chat.page.keyboard.press("Escape")
    field.wait_for(state="hidden")
    chat.page.keyboard.press("Control+k")
    assert field.input_value() == ""
    field.fill("/")
    for key in ("ArrowDown", "ArrowUp", "ArrowUp", "Enter"):  # from the first to the last one
        field.press(key)
    chat.page.get_by_role("dialog", name="Commands and keys").wait_for()
    chat.page.keyboard.press("Escape")
    chat.page.keyboard.press("Control+k")
    field.fill("/max")
    assert field.evaluate(
        "node => document.getElementById(node.getAttribute('aria-activedescendant')).innerText"
    ).startswith("/max")
    field.press("Enter")
    assert chat.input.input_value() == "/max "
    chat.page.keyboard.type("9")
    chat.input.press("Enter")
    chat.wait_for("The longest answer is now 9.")
    chat.page.keyboard.press("Control+k")
    field.fill("nowhere to be found")
    assert options.count() == 0
