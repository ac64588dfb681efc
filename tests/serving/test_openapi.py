"""The server's own description: what schemathesis makes of it, right and wrong, never ends in a server's error."""

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from rlae_jax.serving.fields import CHAT, COMPLETION
from rlae_jax.serving.openapi import describe
from tests.helpers.serving import FakeEngine, make_catalogue, serving

CHECKS = [not_a_server_error, response_schema_conformance, status_code_conformance]


@pytest.fixture(scope="module")
def address():
    with serving(FakeEngine(slots=16, queue=64, context=64)) as (url, *_):
        yield url


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_request_ends_in_a_servers_error(address, mode):
    for found in schemathesis.openapi.from_url(f"{address}/openapi.json").get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue  # there is nothing to be wrong

        @settings(max_examples=25, phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case):
            case.validate_response(case.call(), checks=CHECKS)

        check()


def test_every_field_is_described():
    engine = FakeEngine()
    document = describe(make_catalogue(engine))
    engine.close()
    schemas = document["components"]["schemas"]
    for name, fields in (("CompletionRequest", COMPLETION), ("ChatRequest", CHAT)):
        assert schemas[name]["properties"].keys() == fields.keys()
        assert schemas[name]["required"] == [field for field, how in fields.items() if how.required]
    assert "both, left, right, agent" in document["info"]["description"]
    json.dumps(document)
