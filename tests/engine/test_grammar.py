import json
from functools import reduce

import pytest
import torch

from qzoom import QZoom
from qzoom.engine.batch import events
from qzoom.engine.grammar import ANY_OBJECT, JsonGrammar
from qzoom.errors import SchemaError
from tests import tiny_models

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

PAGE = tiny_models.picture(5, 300, 200)
VALUES = [
    {"type": "string", "maxLength": 8}, {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    {"type": "string", "minLength": 3, "maxLength": 6, "pattern": '^[a-z\u00e9"]+$'},
    {"type": "string", "format": "date"}, {"enum": ["receipt", "invoice", 'say "no"']},
    {"enum": [1, 2.5, None, "x", True]}, {"type": "integer", "minimum": -5, "maximum": 300}, {"type": "boolean"},
    {"const": {"a": [1, 2]}}, {"anyOf": [{"type": "string", "maxLength": 5}, {"type": "null"}]},
]  # fmt: skip


def forms(value: dict) -> list[dict]:
    """A value in an object, in an array, nested, by reference, and by a reference to itself."""
    pair = {"type": "object", "properties": {"k": value, "n": {"type": "boolean"}}, "additionalProperties": False}
    node = {"type": "object", "properties": {"v": value}, "required": ["v"], "additionalProperties": False}
    deep = node | {"properties": {"v": value, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/leaf"}]}}}
    lists = {"type": "array", "items": value, "minItems": 1, "maxItems": 3}
    return [
        pair | {"required": ["k", "n"]},
        lists,
        {"type": "object", "properties": {"rows": lists | {"items": pair | {"required": ["n"]}}}, "required": ["rows"]}
        | {"additionalProperties": False},
        {"$ref": "#/$defs/node", "$defs": {"node": node}},
        deep | {"$defs": {"leaf": node}, "required": ["v", "next"]},
    ]


SCHEMAS = [form for value in VALUES for form in forms(value)]


@pytest.fixture(scope="module")
def model():
    return QZoom.from_pretrained("tiny", dtype="float32", device_map="cpu")


@pytest.mark.parametrize(("schemas", "more"), [(SCHEMAS, {}), (SCHEMAS[1::2], {"temperature": 1.0, "seed": 4})])
def test_schemas_of_all_forms(model, schemas, more):
    assert len(SCHEMAS) == 50
    texts = [json.dumps(schema) for schema in schemas]
    options = {"zoom": "never", "coarse_tokens": 64, "max_new_tokens": 400, **more}
    answers = model.ask_batch([(PAGE, "What is the date?")] * len(schemas), json_schema=texts, **options)
    for schema, answer in zip(schemas, answers, strict=True):
        assert answer.finish_reason == "stop", (schema, answer.text)
        jsonschema.Draft202012Validator(schema).validate(json.loads(answer.text))


def test_a_cut_answer_is_the_beginning_of_a_whole_one(model):
    text = json.dumps(SCHEMAS[2])
    whole = model.ask(PAGE, "What is the date?", zoom="never", json_schema=text, max_new_tokens=300)
    cut = model.ask(PAGE, "What is the date?", zoom="never", json_schema=text, max_new_tokens=6)
    assert (whole.finish_reason, cut.finish_reason) == ("stop", "length")
    assert whole.text.startswith(cut.text)


def test_any_object(model):
    """Random tokens that the grammar lets pass, often closing ones, spell objects of all kinds."""
    backbone, found = model.engine.backbone, []
    closing = [token for text in ('"', "}", "]") for token in backbone.tokenizer.encode(text)]
    for seed in range(20):
        generator, grammar, tokens = torch.Generator().manual_seed(seed), JsonGrammar(backbone, ANY_OBJECT), []
        while not grammar.ended and len(tokens) < 400:
            logits = torch.rand(backbone.model.config.text_config.vocab_size, generator=generator)
            logits[closing] += torch.rand((), generator=generator)
            tokens.append(int(grammar.mask(logits).argmax()))
            grammar.advance(tokens[-1])
        if grammar.ended:
            found.append(json.loads(backbone.tokenizer.decode(tokens, skip_special_tokens=True)))
    assert len(found) > 10
    assert all(isinstance(value, dict) for value in found)
    assert any(found)  # not only empty ones


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "pattern": "a(?=b)"}, "look-ahead"),
        ({"type": "string", "format": "nothing-known"}, "nothing-known"),
        ({"type": "frob"}, "frob"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "integer", "minimum": 9, "maximum": 1}, "minimum"),
        ({"$ref": "http://example.com/schema"}, "example.com"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "(no finite text follows it)"),
        ({"$ref": "#"}, "(no finite text follows it)"),
        ({"type": "object", "required": ["b"], "additionalProperties": False}, "Unsatisfiable"),
        ({"if": {"type": "string"}, "then": {"minLength": 3}}, "if"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "minLength": 2}]}, "oneOf"),
        ({"type": "integer", "multipleOf": 999_983}, "999983"),
        ({"anyOf": [{"type": "object", "minProperties": 5000}]}, "5000"),
        (reduce(lambda inner, _: {"type": "array", "items": inner}, range(150), {"type": "null"}), "recursion"),
        ([], "must be an object"),
        (True, "must be an object"),
    ],
)
def test_what_the_grammar_cannot_follow_is_one_sentence(model, schema, word):
    with pytest.raises(SchemaError, match=r"^The JSON schema [^\n]*\.$") as caught:
        model.make_options(json_schema=json.dumps(schema))
    assert word in str(caught.value)


def test_a_grammar_that_becomes_too_complex_ends_its_own_answer_only(model):
    fields = {f"k{i}": {"type": "string", "pattern": f"^(a|b{i})*c{{0,{i}}}$"} for i in range(800)}
    wide = json.dumps({"type": "object", "properties": fields})
    options = {"zoom": "never", "max_new_tokens": 6}
    requests = [model.request(PAGE, "What is the date?", **options, **more) for more in ({"json_schema": wide}, {})]
    ends = {key: event for key, event in events(model.engine, requests) if event.answer or event.error}
    assert isinstance(ends[0].error, SchemaError)
    assert "too complex" in str(ends[0].error)
    assert ends[1].answer is not None
    assert ends[1].answer.text == model.ask(PAGE, "What is the date?", **options).text
    with pytest.raises(SchemaError, match="not JSON"):
        JsonGrammar(model.engine.backbone, "{")


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_family_follows_its_own_end_tokens(family):
    model = QZoom(tiny_models.engine(family))
    schema = {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 2}
    answer = model.ask(PAGE, "Which?", zoom="never", json_schema=json.dumps(schema), max_new_tokens=60)
    assert answer.finish_reason == "stop"
    jsonschema.validate(json.loads(answer.text), schema)
