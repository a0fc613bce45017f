"""What a fetch fails with whose sources are all out."""

from __future__ import annotations

import pytest

from torchft.checkpointing import CheckpointError, CheckpointTimeout, SourceLost, StepNotServed, Unauthorized
from torchft.checkpointing.http_source import HTTPSource, failure_of

GONE, SILENT, DECLINED, TOKEN = SourceLost("gone"), CheckpointTimeout("silent"), StepNotServed("no"), Unauthorized("no")


@pytest.mark.parametrize(
    ("reasons", "kind"),
    [
        ([TOKEN], Unauthorized),
        ([TOKEN, TOKEN], Unauthorized),
        ([TOKEN, DECLINED], StepNotServed),
        ([DECLINED, DECLINED], StepNotServed),
        ([SILENT, SILENT], CheckpointTimeout),
        ([TOKEN, GONE], SourceLost),
        ([DECLINED, SILENT], SourceLost),
    ],
)
def test_it_is_a_refusal_where_all_refuse_and_every_source_is_named(
    reasons: list[CheckpointError], kind: type[CheckpointError]
) -> None:
    sources = [HTTPSource(i, f"replica rank {i}", []) for i in range(len(reasons))]
    for source, why in zip(sources, reasons, strict=True):
        source.end(why)
    failure = failure_of(sources, 4)
    assert type(failure) is kind
    assert all(f"{source.name}: {source.why}" in str(failure) for source in sources)
