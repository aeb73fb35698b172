import pytest

from qzoom.store.schema import Question, Turn
from tests.tiny_models import picture


@pytest.fixture
def questions(tmp_path):
    """Two turns of one picture have answers; a question has none, another no picture."""
    picture(1, 260, 180).save(tmp_path / "a.png")
    root = str(tmp_path)
    return [
        Question(
            "a", "a.png", (Turn("What?", ("x", "y")), Turn("Nobody knows?"), Turn("Who?", ("z",))), "text", "s", root
        ),
        Question("b", "a.png", (Turn("Nobody knows?"),), "text", "s", root),
        Question("c", "gone.png", (Turn("What?", ("x",)),), "text", "s", root),
    ]
