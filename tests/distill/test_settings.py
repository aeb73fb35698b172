"""Roles of a recipe: what is read, what is refused, what is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qzoom.distill.answer import AnswerStep
from qzoom.distill.build import build_roles
from qzoom.distill.by_endpoint import EndpointTeacher
from qzoom.distill.by_rule import RuleAsker, RuleMaker, RuleTeacher
from qzoom.distill.roles import RolesSettings, roles_from_mapping
from qzoom.errors import ConfigError, StopRunError
from qzoom.llm.cache import Cost
from tests.distill.views import ITEM, StillViews
from tests.llm.stub import Stub, always, serve

END = {"url": "http://127.0.0.1:9/v1", "model": "m"}


def read(**values: Any) -> RolesSettings:
    return roles_from_mapping({"teachers": [{"by": "rule"}]} | values, "r.yaml: roles")


def test_a_recipe_is_read() -> None:
    settings = read(
        asker={"by": "endpoint", "count": 2, "endpoints": [END | {"concurrency": 3}]},
        teachers=[{"name": "a", "error_rate": 0.1}, {"by": "endpoint", "plain": True, "endpoints": [END]}],
        maker={"by": "rule"},
        calls={"retries": 2},
        judge=None,
    )
    assert settings.asker.endpoints[0].concurrency == 3
    assert settings.asker.label == "m"
    assert [(one.label, one.plain) for one in settings.teachers] == [("a", False), ("m", True)]
    assert settings.calls.retries == 2
    assert [role for role, _ in settings.members()] == ["asker", "validator", "maker", "teacher", "teacher"]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"teacher": []}, "did you mean 'teachers'"),
        ({"teachers": []}, "name at least one teacher"),
        ({"teachers": {"by": "rule"}}, "teachers must be a list"),
        ({"teachers": [{}, {}]}, "two teachers are called 'rule'"),
        ({"teachers": [{"by": "rule", "endpoint": []}]}, "teachers, number 1: unknown key 'endpoint'; did you mean"),
        ({"teachers": [{"by": "endpoint"}]}, "teachers, number 1: A role by endpoint needs at least one"),
        ({"teachers": [{"by": "rule", "endpoints": [END]}]}, "has no endpoints"),
        ({"teachers": [{"by": "model"}]}, "must be one of rule, endpoint"),
        ({"teachers": [{"error_rate": 2}]}, "from 0.0 to 1.0"),
        ({"teachers": [{"name": "a\nb"}]}, "without line breaks"),
        ({"teachers": [{"plain": 1}]}, "plain must be true or false"),
        ({"asker": 3}, "r.yaml: roles: asker must be a mapping"),
        ({"judge": {"by": "rule"}}, "judge must be by: endpoint"),
        ({"calls": {"retry": 1}}, "r.yaml: roles: calls: unknown key 'retry'; did you mean 'retries'"),
        ({"calls": {"retries": -1}}, "r.yaml: roles: calls: .*retries"),
        ({"asker": {"sampling": {"temperature": -1}}}, "asker: sampling: .*temperature"),
        ({"asker": {"sampling": {"send_seed": 1}}}, "send_seed must be true or false"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_place(values: dict[str, Any], sentence: str) -> None:
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
        ({"timeout": 3}, "endpoints, number 1: unknown key 'timeout'; did you mean 'timeout_s'"),
    ],
)
def test_endpoints_are_checked(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as failure:
        read(asker={"by": "endpoint", "endpoints": [END | change]})
    assert "r.yaml: roles: asker: endpoints, number 1" in str(failure.value)


def test_endpoints_of_a_role_serve_one_model() -> None:
    with pytest.raises(ConfigError, match="several models are several teachers"):
        read(asker={"by": "endpoint", "endpoints": [END, END | {"model": "n"}]})
    read(asker={"by": "endpoint", "endpoints": [END, END | {"url": "http://127.0.0.1:10/v1"}]})


def test_rules_need_no_file(tmp_path: Path) -> None:
    roles = build_roles(read(maker={"by": "rule"}, student={"error_rate": 0.5}), tmp_path / "calls.sqlite")
    roles.check()
    assert (type(roles.asker), type(roles.maker)) == (RuleAsker, RuleMaker)
    assert roles.teachers == (RuleTeacher(),)
    assert roles.costs() == ()
    roles.close()
    assert list(tmp_path.iterdir()) == []


def test_endpoints_share_one_file_and_say_what_they_cost(tmp_path: Path) -> None:
    stub = Stub(always("A4"))
    with serve(stub) as url:
        end = {"url": url, "model": "m", "prompt_price": 0.01, "completion_price": 0.1}
        settings = read(teachers=[{"name": name, "by": "endpoint", "plain": True, "endpoints": [end]} for name in "ab"])
        for expected in (4, 0):
            roles = build_roles(settings, tmp_path / "calls.sqlite")
            roles.check()
            (item,) = AnswerStep(roles.teachers, StillViews(), 2)(ITEM)
            assert [vote.text for vote in item.votes] == ["A4"] * 4
            assert sum(cost.requests for cost in roles.costs()) == expected
            total = sum(cost.money for cost in roles.costs(all_time=True))
            assert total == pytest.approx(4 * (0.1 * 0.01 + 0.01 * 0.1))
            again = build_roles(settings, tmp_path / "calls.sqlite")
            assert isinstance(again.teachers[0], EndpointTeacher)
            assert again.teachers[0].answer(ITEM, StillViews(), 0).text == "A4"
            again.close()
            roles.close()
        assert roles.costs()[0] == Cost("teacher", "a", "", kept=3)
        roles.close()
    assert list(stub.asked.values()) == [2, 2]  # one body, two teachers


def test_a_role_whose_endpoint_is_down_stops_the_run_before_it_starts(tmp_path: Path) -> None:
    with serve(Stub(always("x"))) as url:
        pass
    roles = build_roles(
        read(asker={"by": "endpoint", "endpoints": [{"url": url, "model": "m"}]}), tmp_path / "calls.sqlite"
    )
    with pytest.raises(StopRunError, match=rf"The asker 'm' at {url} is down"):
        roles.check()
    roles.close()
