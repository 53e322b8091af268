"""Requests drawn from the server's own OpenAPI document: none makes it fail.

``AUTOVOICE_FUZZ_EXAMPLES`` draws more of them per operation (10).
"""

from __future__ import annotations

import os
from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from auto_voice.server import ServerSettings, create_app
from server_kit import Live, mock_engine

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

EXAMPLES = int(os.environ.get("AUTOVOICE_FUZZ_EXAMPLES", "10"))
# schemathesis brings libraries that warn about themselves.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    live = Live(create_app(ServerSettings(data_dir=folder, grace_seconds=1), mock_engine(folder)))
    yield live
    live.stop()


def test_no_request_makes_the_server_fail(fuzzed):
    schema = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    seen: Counter[int] = Counter()

    def ask(case):
        answer = case.call(timeout=60)
        seen[answer.status_code] += 1
        assert answer.status_code < 500, (answer.status_code, answer.text[:500])
        if answer.status_code >= 400 and case.method != "HEAD":
            assert answer.json()["error"]["message"]

    options = settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    for operation in operations:
        options(given(operation.as_strategy())(ask))()
    print(f"{len(operations)} operations; answers by status: {dict(sorted(seen.items()))}")
    assert sum(seen.values()) >= len(operations)
    assert fuzzed.context.workers.alive
