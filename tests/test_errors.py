import json

import pytest
from fastapi.exceptions import RequestValidationError

from nanochat.common import UserError
from nanochat.serve.errors import ApiError, as_api_error


def test_errors_have_the_shape_of_the_api_and_stay_ascii():
    error = ApiError(400, "lone \ud800", code="c", param="p")
    assert error.response().body == (
        b'{"error": {"message": "lone \\ud800", "type": "invalid_request_error", "param": "p", "code": "c"}}'
    )
    assert ApiError(503, "x", retry_seconds=7).response().headers["retry-after"] == "7"
    assert ApiError(401, "x").response().headers["www-authenticate"] == "Bearer"
    kinds = {401: "authentication", 403: "permission", 404: "invalid_request", 429: "rate_limit", 500: "server"}
    for status, kind in kinds.items():
        assert json.loads(ApiError(status, "").json)["error"]["type"] == f"{kind}_error"


@pytest.mark.parametrize(
    ("path", "param"),
    [
        (("body", "temperature"), "temperature"), (("body", "user"), "user"), (("body",), None),
        (("body", "messages", 3, "user", "content", "list[TextPart]", 1, "text"), "messages[3].content[1].text"),
        (("body", "stop", "constrained-str"), "stop"),
        (("body", "messages", 0, "assistant", "content", "str"), "messages[0].content"),
    ],
)  # fmt: skip
def test_a_fault_is_named_by_its_place_in_the_request(path, param):
    error = as_api_error(RequestValidationError([{"loc": path, "type": "missing", "msg": "Field required"}]))
    assert error.param == param


def test_of_several_faults_the_deepest_is_told():
    faults = [
        {"loc": ("body", "stop", "str"), "type": "string_type", "msg": "shallow"},
        {"loc": ("body", "stop", "list[str]", 2), "type": "string_type", "msg": "deep"},
    ]
    assert as_api_error(RequestValidationError(faults)).message == "stop[2]: deep"


def test_a_user_error_is_told_and_any_other_exception_is_not():
    told, hidden = as_api_error(UserError("too hot")), as_api_error(RuntimeError("a secret"))
    assert (told.status, told.message) == (400, "too hot")
    assert hidden.status == 500
    assert "secret" not in hidden.json
