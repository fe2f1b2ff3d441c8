"""SamplingParams: defaults, normalisation, and one clear line for every wrong value."""

import dataclasses
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest

from realm_jax.errors import InvalidRequestError
from realm_jax.sampling_params import SamplingParams

REFUSED = [
    ("max_tokens", 0),
    ("max_tokens", True),
    ("max_tokens", 5.0),
    ("max_tokens", "5"),
    ("temperature", -1),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("temperature", 10**400),
    ("temperature", 10**5000),
    ("temperature", "hot\nor not"),
    ("temperature", None),
    ("temperature", True),
    ("top_k", -1),
    ("top_k", 1.5),
    ("top_p", 5),
    ("top_p", 0),
    ("top_p", -0.1),
    ("top_p", float("nan")),
    ("min_p", 1.1),
    ("min_p", -0.1),
    ("typical_p", 0),
    ("typical_p", 2),
    ("repetition_penalty", 0),
    ("repetition_penalty", -1.0),
    ("repetition_penalty", float("inf")),
    ("frequency_penalty", 2.5),
    ("presence_penalty", -3),
    ("logit_bias", [1, 2]),
    ("logit_bias", {"1": 2.0}),
    ("logit_bias", {-1: 2.0}),
    ("logit_bias", {1: float("nan")}),
    ("logit_bias", {1: None}),
    ("stop", 5),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", [5]),
    ("stop", b"x"),
    ("stop", "\ud800"),
    ("stop", ["a"] * 257),
    ("stop_token_ids", 5),
    ("stop_token_ids", "12"),
    ("stop_token_ids", [1.0]),
    ("stop_token_ids", [-1]),
    ("ignore_eos", 1),
    ("ignore_eos", "no"),
    ("seed", -1),
    ("seed", 10**5000),
    ("seed", 2**64),
    ("seed", 1.0),
    ("n", 0),
    ("n", 257),
    ("logprobs", 21),
    ("logprobs", -1),
    ("logprobs", True),
    ("grammar", " "),
    ("grammar", b"start: /a/"),
    ("grammar", '{"grammars": []}'),
    ("grammar", {"regexp": "a"}),
    ("grammar", {"regex": 5}),
    ("grammar", {"regex": "a", "flags": "i"}),
    ("grammar", "start: /\ud800/"),
    ("grammar", "x" * 65537),
    ("json_schema", 5),
    ("json_schema", False),
    ("json_schema", []),
    ("json_schema", "[1]"),
    ("json_schema", '{"type": '),
    ("json_schema", '{"minimum": NaN}'),
    ("json_schema", {"minimum": float("inf")}),
    ("json_schema", {"enum": {1, 2}}),
    ("json_schema", {"const": "\ud800"}),
    ("json_schema", '{"items":' * 9000 + "{}" + "}" * 9000),
    ("json_schema", {"const": "x" * 65536}),
]


@pytest.mark.parametrize(("field", "value"), REFUSED, ids=[f"{f}-{i}" for i, (f, _) in enumerate(REFUSED)])
def test_refused_value_names_field_and_accepted_range(field, value):
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{field: value})
    message = str(caught.value)
    assert field in message
    assert "accepted" in message
    assert "\n" not in message
    assert len(message) < 300


def test_unknown_name_is_one_line_with_a_hint():
    with pytest.raises(
        InvalidRequestError, match="unknown sampling parameter 'temprature'; did you mean 'temperature'"
    ):
        SamplingParams(temprature=1.0)
    with pytest.raises(InvalidRequestError, match="unknown sampling parameter"):
        dataclasses.replace(SamplingParams(), nonsense=1)


def test_too_many_positional_values():
    with pytest.raises(InvalidRequestError, match="at most 18"):
        SamplingParams(*range(19))


def test_defaults():
    params = SamplingParams()
    assert (params.max_tokens, params.temperature, params.n, params.seed, params.logprobs) == (128, 0.0, 1, None, None)
    assert SamplingParams(7, 0.5).temperature == 0.5  # the order of the fields is part of the contract


def test_values_become_plain_python():
    params = SamplingParams(
        max_tokens=np.int32(3),
        temperature=np.float32(0.5),
        top_p=1,
        stop="x",
        stop_token_ids=np.array([1, 2]),
        logit_bias={np.int64(4): np.float32(1.5)},
        ignore_eos=np.True_,
        seed=np.uint64(2**64 - 1),
    )
    assert type(params.max_tokens) is int
    assert type(params.temperature) is float
    assert params.stop == ("x",)
    assert params.stop_token_ids == (1, 2)
    assert params.logit_bias == {4: 1.5}
    assert params.ignore_eos is True
    assert params.seed == 2**64 - 1


def test_none_stands_for_no_stops():
    assert SamplingParams(stop=None, stop_token_ids=None) == SamplingParams()
    assert SamplingParams(stop=[], stop_token_ids=[]) == SamplingParams()


def test_frozen_comparable_and_copyable():
    params = SamplingParams(temperature=0.7, stop=["a", "b"], logit_bias={1: 2})
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 1.0
    assert pickle.loads(pickle.dumps(params)) == params
    assert dataclasses.replace(params, temperature=0.1).stop == ("a", "b")


def test_ids_are_checked_against_the_vocabulary():
    SamplingParams(logit_bias={9: 1.0}, stop_token_ids=[9]).check_vocabulary(10)
    with pytest.raises(InvalidRequestError, match="logit_bias names token 10; accepted: 0 to 9"):
        SamplingParams(logit_bias={10: 1.0}).check_vocabulary(10)
    with pytest.raises(InvalidRequestError, match="stop_token_ids names token 12"):
        SamplingParams(stop_token_ids=[3, 12]).check_vocabulary(10)


def test_importing_does_not_import_jax():
    code = "import realm_jax.sampling_params, realm_jax.results, sys; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_grammars_and_schemas_are_kept_as_text():
    assert SamplingParams(json_schema=True).json_schema == SamplingParams(json_schema={}).json_schema == "{}"
    schema = {"properties": {"b": {}, "a": {}}}
    assert json.loads(SamplingParams(json_schema=schema).json_schema) == schema
    assert SamplingParams(json_schema=json.dumps(schema)) == SamplingParams(json_schema=schema)
    assert SamplingParams(grammar='start: "a"').grammar == 'start: "a"'
    assert SamplingParams(grammar={"regex": "{a"}).grammar == {"regex": "{a"}
    with pytest.raises(InvalidRequestError, match="both given; accepted: one of them"):
        SamplingParams(grammar='start: "a"', json_schema=True)
