"""In which order parts take their turns."""

import pytest

from gatewise.moe.turns import Turn, turns


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("blocks", [1, 3])
def test_every_part_passes_every_block_step_by_step(blocks: int, parts: int) -> None:
    place = {turn: index for index, turn in enumerate(turns(blocks, parts))}
    assert len(place) == 3 * blocks * parts
    for part in range(parts):
        own = [
            place[Turn(step, block, part)]
            for block in range(blocks)
            for step in ("enter", "send", "work")
        ]
        assert own == sorted(own)


@pytest.mark.parametrize("parts", [4, 5, 8])
def test_rows_travel_beside_the_work_of_another_part(parts: int) -> None:
    order = list(turns(3, parts))
    for block in (0, 1):
        for part in range(parts):
            sent, works, again = (
                order.index(Turn(step, block + later, part))
                for step, later in (("send", 0), ("work", 0), ("enter", 1))
            )
            for between in (order[sent:works], order[works + 1 : again]):
                inside = [turn for turn in between if turn.step == "work" and turn.part != part]
                # before the first part works there is nothing that could
                assert inside or (block, part) < (0, parts - 2)
