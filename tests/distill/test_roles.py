from typing import Any

import pytest

from qzoom.distill.ask import answer_step
from qzoom.distill.roles import RolesSettings, build_roles
from qzoom.errors import ConfigError, StopRunError
from qzoom.llm.cache import Cost
from qzoom.settings import from_mapping
from tests.distill.views import ITEM, StillViews
from tests.llm.stub import Stub, always, nobody, serve

END = {"url": "http://127.0.0.1:9/v1", "model": "m"}


def read(**values: Any) -> RolesSettings:
    return from_mapping(RolesSettings, {"teachers": [{"by": "rule"}]} | values, "r.yaml: roles")


def test_a_recipe_is_read():
    settings = read(
        question_writer={"by": "endpoint", "count": 2, "endpoints": [END | {"concurrency": 3}]},
        teachers=[{"name": "a", "error_rate": 0.1}, {"by": "endpoint", "plain": True, "endpoints": [END]}],
        distractor_writer={"by": "rule"},
        calls={"retries": 2},
        judge=None,
    )
    assert settings.question_writer.endpoints[0].concurrency == 3
    assert settings.question_writer.label == "m"
    assert [(one.label, one.plain) for one in settings.teachers] == [("a", False), ("m", True)]
    assert settings.calls.retries == 2
    assert [role for role, _ in settings.members()] == [
        "question_writer",
        "validator",
        "distractor_writer",
        "teacher",
        "teacher",
    ]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"teacher": []}, "did you mean 'teachers'"),
        ({"teachers": []}, "name at least one teacher"),
        ({"teachers": {"by": "rule"}}, "teachers must be a list"),
        ({"teachers": [{}, {}]}, "two teachers are called 'rule'"),
        ({"teachers": [{"by": "rule", "endpoint": []}]}, r"teachers\[0\]: unknown key 'endpoint'; did you mean"),
        ({"teachers": [{"by": "endpoint"}]}, r"teachers\[0\]: A role by endpoint needs at least one"),
        ({"teachers": [{"by": "rule", "endpoints": [END]}]}, "has no endpoints"),
        ({"teachers": [{"by": "model"}]}, "must be one of rule, endpoint"),
        ({"teachers": [{"error_rate": 2}]}, "from 0 to 1"),
        ({"teachers": [{"name": "a\nb"}]}, "without line breaks"),
        ({"teachers": [{"plain": 1}]}, "plain must be true or false"),
        ({"question_writer": 3}, "r.yaml: roles: question_writer must be a mapping"),
        ({"judge": {"by": "rule"}}, "judge must be by: endpoint"),
        ({"calls": {"retry": 1}}, "r.yaml: roles: calls: unknown key 'retry'; did you mean 'retries'"),
        ({"calls": {"retries": -1}}, "r.yaml: roles: calls.retries must be a whole number"),
        ({"question_writer": {"sampling": {"temperature": -1}}}, "writer.sampling.temperature must be a number"),
        ({"question_writer": {"sampling": {"send_seed": 1}}}, "send_seed must be true or false"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_place(values, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read(**values)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"url": "localhost:80"}, "must start with http"),
        ({"url": "http://me:secret@127.0.0.1/v1"}, "must hold no name or key"),
        ({"model": ""}, "needs the name of a model"),
        ({"key_env": "sk-123456"}, "must name an environment variable, not hold a key"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"concurrency": 0}, "concurrency"),
        ({"prompt_price": -1}, "prompt_price"),
        ({"extra_body": []}, "must be a mapping"),
        ({"extra_body": {"messages": []}}, "must not set messages"),
        ({"extra_body": {"a": float("nan")}}, "plain JSON values"),
        ({"timeout": 3}, r"endpoints\[0\]: unknown key 'timeout'; did you mean 'timeout_s'"),
    ],
)
def test_endpoints_are_checked(change, sentence):
    with pytest.raises(ConfigError, match=sentence) as failure:
        read(question_writer={"by": "endpoint", "endpoints": [END | change]})
    assert "r.yaml: roles: question_writer.endpoints[0]" in str(failure.value)


def test_roles_of_one_model_and_rules_without_files(tmp_path):
    with pytest.raises(ConfigError, match="several models are several teachers"):
        read(question_writer={"by": "endpoint", "endpoints": [END, END | {"model": "n"}]})
    read(question_writer={"by": "endpoint", "endpoints": [END, END | {"url": "http://127.0.0.1:10/v1"}]})
    roles = build_roles(read(distractor_writer={"by": "rule"}, student={"error_rate": 0.5}), tmp_path / "calls.sqlite")
    roles.check()
    assert {one.model for one in (roles.question_writer, roles.validator, roles.distractor_writer)} == {"rule"}
    assert [one.model for one in (*roles.teachers, roles.student)] == ["rule that knows the answer"] * 2
    assert roles.costs() == ()
    roles.close()
    assert list(tmp_path.iterdir()) == []


def test_endpoints_share_one_file_and_say_what_they_cost(tmp_path):
    stub = Stub(always("A4"))
    with serve(stub) as url:
        end = {"url": url, "model": "m", "prompt_price": 0.01, "completion_price": 0.1}
        settings = read(teachers=[{"name": name, "by": "endpoint", "plain": True, "endpoints": [end]} for name in "ab"])
        for expected in (4, 0):
            roles = build_roles(settings, tmp_path / "calls.sqlite")
            roles.check()
            (item,) = answer_step(roles.teachers, StillViews(), 2)(ITEM)
            assert [vote.text for vote in item.votes] == ["A4"] * 4
            assert sum(cost.requests for cost in roles.costs()) == expected
            total = sum(cost.money for cost in roles.shared.cache.costs())
            assert total == pytest.approx(4 * (0.1 * 0.01 + 0.01 * 0.1))
            again = build_roles(settings, tmp_path / "calls.sqlite")
            assert again.teachers[0].call(ITEM, StillViews(), 0).text == "A4"
            again.close()
            roles.close()
        assert roles.costs()[0] == Cost("teacher", "a", "", kept=3)
        roles.close()
    assert list(stub.asked.values()) == [2, 2]  # one body, two teachers


def test_a_role_whose_endpoint_is_down_stops_the_run_before_it_starts(tmp_path):
    with nobody() as url:
        writer = {"by": "endpoint", "endpoints": [{"url": url, "model": "m"}]}
        roles = build_roles(read(question_writer=writer), tmp_path / "calls.sqlite")
        with pytest.raises(StopRunError, match=rf"The question writer 'm' at {url} is down"):
            roles.check()
        roles.close()
