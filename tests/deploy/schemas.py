"""JSON schemas for kubeconform, each in one file, refusing unknown fields.

schemas.py FOLDER VERSION... CRD...

Those of the Kubernetes API, FOLDER/vVERSION, are made from what comes with the
package kubernetes-validate. Those of custom resources, FOLDER/custom, are made
from their definitions and are the same for all versions of Kubernetes.
"""

import json
import pathlib
import re
import sys

import kubernetes_validate
import yaml


def strict(schema):
    """The schema, refusing fields that it does not name."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    free = made.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(made.get("properties"), dict) and not free:
        made.setdefault("additionalProperties", False)
    if made.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return made


def references(schema, found):
    """Adds the names of the definitions that the schema refers to, and makes
    the references local."""
    if isinstance(schema, list):
        for part in schema:
            references(part, found)
    elif isinstance(schema, dict):
        target = schema.get("$ref")
        if isinstance(target, str):
            name = target.rpartition("/")[2]
            schema["$ref"] = f"#/definitions/{name}"
            found.add(name)
        for part in schema.values():
            references(part, found)


def standalone(schema, definitions):
    """The schema with all definitions it needs in it."""
    needed, waiting = {}, set()
    references(schema, waiting)
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed[name] = json.loads(json.dumps(definitions[name]))
            references(needed[name], waiting)
    own = {key: part for key, part in schema.items() if key not in ("$id", "$schema")}
    return own | {"definitions": needed}


def api(version, folder):
    """The schemas of the API's own kinds."""
    package = pathlib.Path(kubernetes_validate.__file__).parent
    (source,) = (package / "kubernetes-json-schema").glob(f"v{version}.*-local-strict")
    definitions = json.loads((source / "_definitions.json").read_text())["$defs"]
    folder.mkdir(parents=True)
    for path in source.glob("*.json"):
        if path.name == "_definitions.json":
            continue
        schema = json.loads(path.read_text())
        if {"apiVersion", "kind", "metadata"} <= schema.get("properties", {}).keys():
            made = json.dumps(standalone(schema, definitions))
            (folder / path.name).write_text(made)


def main(folder, *sources):
    folder = pathlib.Path(folder)
    custom = folder / "custom"
    custom.mkdir(parents=True)
    for source in sources:
        if re.fullmatch(r"\d+\.\d+", source):
            api(source, folder / f"v{source}")
            continue
        definition = yaml.safe_load(pathlib.Path(source).read_text())
        group = definition["spec"]["group"].split(".")[0]
        kind = definition["spec"]["names"]["kind"].lower()
        for version in definition["spec"]["versions"]:
            schema = strict(version["schema"]["openAPIV3Schema"])
            # What every object has, and the API server checks by itself.
            schema["properties"]["metadata"] = {"type": "object"}
            name = f"{kind}-{group}-{version['name']}.json"
            (custom / name).write_text(json.dumps(schema))


main(*sys.argv[1:])
