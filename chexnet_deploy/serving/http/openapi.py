"""The API's description (OpenAPI 3.1), written by hand: it says what is refused too, which no generator would.

Code, not a JSON file: that had 2,300 lines, or 960 with references, which the page at /docs would have to resolve; and the
reasons of refusals come from their enums.
"""

from typing import Any, Final

from chexnet_deploy import __version__
from chexnet_deploy.errors import RefusalReason
from chexnet_deploy.serving.http.refusals import Fault

_Json = dict[str, Any]


def _closed(properties: _Json, *required: str) -> _Json:
    """Return an object that has these properties and no others."""
    return {"type": "object", "required": [*required], "additionalProperties": False, "properties": properties}


_PROBABILITIES: Final[_Json] = {
    "type": "object",
    "additionalProperties": {"type": "number", "minimum": 0, "maximum": 1},
}
_ERROR: Final = _closed(
    {
        "error": {"type": "string"},
        "reason": {"enum": [*(fault.value for fault in Fault), *(reason.value for reason in RefusalReason)]},
    },
    "error",
    "reason",
)
_CAM: Final[_Json] = {
    "type": "object",
    "required": ["finding", "has_evidence", "png_base64"],
    "properties": {
        "finding": {"type": "string"},
        "has_evidence": {"type": "boolean"},
        "png_base64": {"type": "string"},
    },
}
_ANSWERED: Final[_Json] = {
    "probabilities": _PROBABILITIES,
    "present": {"type": "object", "additionalProperties": {"type": "boolean"}},
    "operating_points": _PROBABILITIES,
    "absent_below": _PROBABILITIES,
    "operating_points_from": {"type": "string"},
    "model": {"type": "string"},
    "bundle": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
    "precision": {"enum": ["fp32", "fp16", "int8"]},
    "backend": {"type": "string"},
}
_RADIOGRAPH: Final = _closed({"png_base64": {"type": "string"}}, "png_base64")
_PREDICTION: Final = _closed({**_ANSWERED, "cam": _CAM, "radiograph": _RADIOGRAPH}, *_ANSWERED)
_SHAPE: Final[_Json] = {"type": "array", "items": {"type": "integer"}}
_INPUT: Final = _closed(
    {
        "name": {"const": "pixels"},
        "datatype": {"const": "UINT8"},
        "shape": {**_SHAPE, "minItems": 4, "maxItems": 4},
        "data": {"type": "array"},
        "parameters": _closed({"binary_data_size": {"type": "integer", "minimum": 0}}),
    },
    "name",
    "datatype",
    "shape",
)
_OUTPUT: Final = _closed(
    {"name": {"enum": ["logits", "cam"]}, "parameters": _closed({"binary_data": {"type": "boolean"}})}, "name"
)
_INFERENCE: Final = _closed(
    {
        "id": {"type": "string", "maxLength": 256},
        "inputs": {"type": "array", "minItems": 1, "maxItems": 1, "items": _INPUT},
        "outputs": {"type": "array", "minItems": 1, "maxItems": 2, "items": _OUTPUT},
        "parameters": _closed(
            {
                "binary_data_output": {"type": "boolean"},
                "timeout": {"type": "integer", "minimum": 1, "description": "microseconds"},
            }
        ),
    },
    "inputs",
)
_RESULT: Final[_Json] = {
    "type": "object",
    "required": ["model_name", "model_version", "outputs"],
    "properties": {
        "model_name": {"type": "string"},
        "model_version": {"type": "string"},
        "id": {"type": "string"},
        "parameters": {"type": "object"},
        "outputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "datatype", "shape"],
                "properties": {
                    "name": {"enum": ["logits", "cam"]},
                    "datatype": {"const": "FP32"},
                    "shape": _SHAPE,
                    "data": {"type": "array", "items": {"type": "number"}},
                    "parameters": {"type": "object"},
                },
            },
        },
    },
}
_BINARY: Final[_Json] = {"type": "string", "format": "binary"}
_WHY: Final = {
    400: "The request is wrong; `error` says what is needed.",
    404: "No such model or version.",
    413: "The body is larger than the limit, which is counted after inflating.",
    415: "An encoding that is not taken.",
    422: "The image is refused; `reason` says why in one word.",
    503: "Busy, or not ready; Retry-After says when to try again.",
}


def describe_api(model: str) -> _Json:
    """Return the OpenAPI document of a service.

    Args:
        model: its model's name.
    """
    version = {
        "name": "version",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "pattern": "^[0-9a-f]{12}$"},
    }
    paths: _Json = {
        "/predict": {"post": _predict()},
        "/engine": {"get": _get("The engine's identity and what was proven of it.", 503)},
        "/metrics": {"get": _get("Metrics in Prometheus' format.", kind="text/plain")},
        "/v2": {"get": _get("The server and the protocol's extensions it has.")},
        "/v2/health/live": {"get": _get("Whether the process can work at all.", health=True)},
        "/v2/health/ready": {"get": _get("Whether images are answered now.", health=True)},
    }
    for path, parameters in ((f"/v2/models/{model}", []), (f"/v2/models/{model}/versions/{{version}}", [version])):
        faults = (404, 503) if parameters else (503,)
        paths[path] = {"get": {**_get("The model's tensors.", *faults), "parameters": parameters}}
        paths[f"{path}/config"] = {
            "get": {**_get("Tensors and batches as Triton names them.", *faults), "parameters": parameters}
        }
        paths[f"{path}/ready"] = {"get": {**_get("Whether the model answers now.", *faults), "parameters": parameters}}
        paths[f"{path}/infer"] = {"post": {**_infer(*faults), "parameters": parameters}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "chexnet-deploy",
            "version": __version__,
            "description": "CheXNet's findings in a chest radiograph. Open Inference Protocol v2 below /v2.",
        },
        "paths": paths,
    }


def _predict() -> _Json:
    cam = {"name": "cam", "in": "query", "schema": {"type": "string"}, "description": "A finding to draw the map of."}
    radiograph = {
        "name": "radiograph",
        "in": "query",
        "schema": {"const": "png"},
        "description": "Asks for the radiograph as the model read it, of at most 1024 px.",
    }
    form = _closed({"image": _BINARY}, "image")
    return {
        "summary": "The findings in one PNG, JPEG or DICOM file.",
        "parameters": [cam, radiograph],
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": _BINARY}, "multipart/form-data": {"schema": form}},
        },
        "responses": {"200": _answer("What the model says.", _PREDICTION), **_errors(400, 413, 415, 422, 503)},
    }


def _infer(*faults: int) -> _Json:
    answer = _answer("Logits and maps.", _RESULT)
    answer["content"]["application/octet-stream"] = {"schema": _BINARY}
    return {
        "summary": "Logits and maps of pixels, as JSON or with the protocol's binary extension.",
        "requestBody": {"required": True, "content": {"application/json": {"schema": _INFERENCE}}},
        "responses": {"200": answer, **_errors(400, 413, 415, 422, *faults)},
    }


def _get(summary: str, *faults: int, kind: str = "application/json", health: bool = False) -> _Json:
    schema: _Json = {"type": "string"} if kind == "text/plain" else {"type": "object"}
    responses = {"200": _answer(summary, schema, kind), **_errors(*faults)}
    if health:
        responses["503"] = _answer("No.", schema)
    return {"summary": summary, "responses": responses}


def _answer(description: str, schema: _Json, kind: str = "application/json") -> _Json:
    return {"description": description, "content": {kind: {"schema": schema}}}


def _errors(*codes: int) -> _Json:
    return {str(code): _answer(_WHY[code], _ERROR) for code in codes}
