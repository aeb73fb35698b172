import dataclasses

from qzoom import QZoom
from qzoom.data.crop import cut
from qzoom.distill.ask import answer_step, read_vote
from qzoom.distill.items import ImageRef, Item, QuestionDraft, TargetRegion
from qzoom.distill.pictures import load_source
from qzoom.distill.roles import RolesSettings, build_roles
from qzoom.distill.vote import VoteSettings, vote_step
from qzoom.settings import from_mapping
from tests.distill.views import StillViews
from tests.serving.running import running


class SceneViews(StillViews):
    """Crops of one drawn scene."""

    def __init__(self) -> None:
        loaded = load_source("scenes:5", "")
        super().__init__(loaded.known)
        self.image = loaded.image

    def crop(self, item: Item):
        return cut(self.image, item.target.crop_box, item.target.scale)


def items(views: SceneViews) -> list[Item]:
    """Two questions about codes, and the objects that carry them."""
    out = []
    for question in views.known(None).questions:
        thing = next((one for one in views.known(None).objects if f"{one.colour} {one.shape}" in question.text), None)
        if question.field == "code" and thing is not None:
            picture = ImageRef("c" * 20, "scenes:5", *views.image.size)
            target = TargetRegion(thing.box, thing.box, "given", 1.0)
            out.append(Item(picture, target, QuestionDraft(question.text, "ocr", "rule", known=question.answer)))
    return out[:2]


def test_a_served_model_answers_about_crops_as_it_does_at_home(tmp_path):
    model = QZoom.from_pretrained("tiny", dtype="float32", device_map="cpu")
    views = SceneViews()
    draft = items(views)
    assert len(draft) == 2
    with running(model) as site:
        end = {"url": f"{site.url}/v1", "model": "tiny", "extra_body": {"qzoom": {"zoom": "never"}}}
        sampling = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 32}
        by = {"by": "endpoint", "plain": True, "sampling": sampling}
        teachers = [by | {"name": name, "endpoints": [end]} for name in ("one", "two")]
        roles = build_roles(from_mapping(RolesSettings, {"teachers": teachers}, "test"), tmp_path / "calls.sqlite")
        roles.check()
        step = answer_step(roles.teachers, views, 1)
        made = [step(item)[0] for item in draft]
        assert [step(item)[0] for item in draft] == made
        costs = roles.costs()
        roles.close()
    for item in made:
        home = read_vote("", 0, model.ask(views.crop(item), item.draft.text, zoom="never", max_new_tokens=32).text)
        assert [(vote.teacher, vote.text, vote.status) for vote in item.votes] == [
            (name, home.text, home.status) for name in ("one", "two")
        ]
        assert item.models == (("teacher", "one: tiny"), ("teacher", "two: tiny"))
        assert home.status == "answered"
        voted = vote_step(VoteSettings(quorum=2, per_teacher=1))(dataclasses.replace(item, decisions=()))[0]
        assert voted.answer.text == home.text
    assert sum(cost.requests for cost in costs) == 4
    assert sum(cost.kept for cost in costs) == 4
    assert all(cost.prompt_tokens > 0 for cost in costs if cost.url)
