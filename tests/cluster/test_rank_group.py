"""One life by its ranks, which are no processes here."""

import asyncio

from biphase.cluster.rank_group import MissingRank, RankGroup


async def test_a_life_has_ended_even_where_what_it_held_cannot_be_given_back() -> None:
    async def give_back() -> None:
        raise ConnectionError("the cluster is gone")

    ranks = [MissingRank("was killed"), MissingRank("was killed")]
    group = RankGroup(name="decode-0", kind="decode", incarnation=1, ranks=ranks, on_gone=give_back)
    assert await asyncio.wait_for(group.ended(), 10) == "rank 0: was killed"
