"""Metadata from a Hub, damaged."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slrmerge.checkpoint.hub.repository import open_repository
from slrmerge.checkpoint.location import Repository
from tests.checkpoint.hub.conftest import CHAT, HubPair, hub, pair
from tests.checkpoint.hub.test_hostile import answer_with
from tests.checkpoint.hub.transport import Answer, Asked
from tests.fuzz.damage import damaged, damaged_bytes, fuzzed
from tests.fuzz.test_files import attempt

__all__ = ["hub", "pair"]


@fuzzed
@given(data=st.data())
@pytest.mark.parametrize(
    "path", [f"/api/models/{CHAT}", f"/api/models/{CHAT}/tree/COMMIT", f"/api/models/{CHAT}/tree/COMMIT/chat_templates"]
)
def test_metadata(pair: HubPair, data: st.DataObject, path: str) -> None:
    template = {"chat_templates/a.jinja": b"{{ messages }}"}
    if not template.keys() <= pair.hub.files(CHAT).keys():  # one commit for all examples: each has a cache of its own
        pair.hub.commit(CHAT, template)
    pair.hub.requests.clear()
    path = path.replace("COMMIT", pair.hub.head(CHAT))
    honest = pair.hub.answer("hub", Asked("GET", path, {}, {}, b""))
    content = data.draw(damaged_bytes(damaged(json.loads(honest.body))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slrmerge.checkpoint.hub.session.MAX_PAGES", 10)  # a damaged list may name itself again and again
        answer_with(patch, pair.hub, path, lambda _: Answer(content))
        attempt(lambda: open_repository(Repository(CHAT)))
