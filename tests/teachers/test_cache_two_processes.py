"""A cache that two processes write and read at once."""

import json
from collections import Counter
from pathlib import Path

import pytest
from processes import run_two

from trl_opd.teachers.cache import CacheReader


@pytest.mark.slow
@pytest.mark.distributed
def test_each_process_records_a_part_and_replays_its_share_of_a_group(tmp_path):
    run_two(str(Path(__file__).parent / "cache_two_processes.py"), tmp_path)
    parts = {path.name[:10] for path in (tmp_path / "cache").glob("*.arrow")}
    assert parts == {"shard-0000", "shard-0001"}
    seen = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
    recorded, replayed = ([(tuple(p), tuple(c)) for s in seen for p, c in s[i]] for i in (0, 1))
    assert len(recorded) == 6
    assert len(CacheReader(tmp_path / "cache")) == len(set(recorded))
    # In two steps, of six samples each, every recorded completion of a prompt comes up as often as its others
    assert len(replayed) == 12
    assert set(replayed) == set(recorded)
    counts = Counter(replayed)
    for prompt in {p for p, _ in recorded}:
        of_prompt = [counts[pair] for pair in set(recorded) if pair[0] == prompt]
        assert max(of_prompt) - min(of_prompt) <= 1
