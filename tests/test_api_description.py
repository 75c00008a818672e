"""Random requests, right and wrong ones, made by schemathesis from the server's own OpenAPI description."""

from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from live_server import KEY, ask, server_fixture
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks

MAX_EXAMPLES = 40
# Not `positive_data_acceptance`: what fits the description may still be wrong (order of roles, a length, the model).
# Not `ignored_auth`, which cannot take away a key given to it: test_api.py looks at that.
CHECKS = [
    not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
    checks.response_headers_conformance, checks.response_schema_conformance, checks.negative_data_rejection,
    checks.unsupported_method,
]  # fmt: skip

server = server_fixture(api_key=KEY)


@pytest.fixture(scope="module")
def description(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers={"authorization": f"Bearer {KEY}"})


def test_the_description_has_all_public_routes(description):
    operations = [result.ok() for result in description.get_all_operations()]
    assert sorted(f"{operation.method.upper()} {operation.path}" for operation in operations) == [
        "GET /health", "GET /metrics", "GET /v1/models", "GET /v1/models/{model}", "POST /detokenize", "POST /tokenize",
        "POST /v1/chat/completions",
        "POST /v1/completions",
    ]  # fmt: skip


KINDS = [(number, mode) for number in range(8) for mode in GenerationMode]
KINDS.remove((0, GenerationMode.NEGATIVE))  # /health: there is nothing that could be wrong


@pytest.mark.parametrize(("number", "mode"), KINDS)
def test_every_request_gets_an_answer_that_the_description_has(server, description, number, mode):
    operation = list(description.get_all_operations())[number].ok()
    statuses = Counter()
    quietly = {"deadline": None, "phases": [Phase.generate], "suppress_health_check": list(HealthCheck)}

    @settings(max_examples=MAX_EXAMPLES, derandomize=True, **quietly)
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case):
        response = case.call_and_validate(headers={"authorization": f"Bearer {KEY}"}, checks=CHECKS)
        statuses[response.status_code] += 1

    check()
    assert all(status < 500 for status in statuses)
    assert server.pool.num_replies == 0
    assert ask(server.port, "/health").json["status"] == "ok"
