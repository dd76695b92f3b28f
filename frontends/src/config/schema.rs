//! The JSON Schema (draft 2020-12) of configuration files, derived from the key table.

use serde_json::{Map, Value, json};

use super::keys::{Branch, Disposition, Kind, Row, index};

/// The schema. It states what single keys take; rules between keys are checked by loading.
pub fn schema() -> Value {
    let mut out = branch(&index().root);
    let head = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Chimera model configuration",
    });
    if let (Value::Object(out), Value::Object(head)) = (&mut out, head) {
        for (at, (key, value)) in head.into_iter().enumerate() {
            out.shift_insert(at, key, value);
        }
    }
    out
}

fn branch(b: &Branch) -> Value {
    if let Some(row) = b.row.or(b.below) {
        return leaf(row);
    }
    if let Some(element) = &b.element {
        return json!({ "type": "array", "items": branch(element) });
    }
    let properties: Map<String, Value> =
        b.named.iter().map(|(name, child)| ((*name).to_owned(), branch(child))).collect();
    let anywhere: Map<String, Value> =
        index().anywhere.iter().map(|(name, row)| (format!("^{name}$"), leaf(row))).collect();
    let other = b.any_key.as_ref().map_or(Value::Bool(false), |child| branch(child));
    json!({
        "type": "object",
        "properties": properties,
        "patternProperties": anywhere,
        "additionalProperties": other,
    })
}

fn leaf(row: &Row) -> Value {
    let mut out = match kind(&row.kind) {
        Value::Object(map) => map,
        _ => Map::new(),
    };
    let text = match row.disposition {
        Disposition::Consumed => row.text.to_owned(),
        Disposition::Declared => format!("{} (checked or printed)", row.text),
        Disposition::Note => format!("{} (remark)", row.text),
        Disposition::NotYet => format!("{} (not implemented)", row.text),
    };
    out.insert("description".into(), text.into());
    if !row.default.is_empty() {
        let default = serde_json::from_str(row.default).expect("the key table holds valid JSON");
        out.insert("default".into(), default);
    }
    Value::Object(out)
}

fn kind(kind_: &Kind) -> Value {
    match kind_ {
        Kind::Bool => json!({ "type": "boolean" }),
        Kind::Flag(only) => json!({ "const": only }),
        Kind::Int(low, high) => json!({ "type": "integer", "minimum": low, "maximum": high }),
        Kind::Num(low, high) => json!({ "type": "number", "minimum": low, "maximum": high }),
        Kind::Text => json!({ "type": "string" }),
        Kind::Words(words) | Kind::Choice(words, _) => json!({ "enum": words }),
        Kind::Size => json!({ "anyOf": [
            { "type": "number", "minimum": 0 },
            { "type": "string", "pattern": "^[0-9]+(\\.[0-9]+)?[KMBT]?$" },
        ] }),
        Kind::List(element, low, high) => {
            json!({ "type": "array", "items": kind(element), "minItems": low, "maxItems": high })
        }
        Kind::Tuple(kinds, required) => {
            let items: Vec<Value> = kinds.iter().map(kind).collect();
            json!({ "type": "array", "prefixItems": items, "items": false, "minItems": required })
        }
        Kind::Either(a, b) => json!({ "anyOf": [kind(a), kind(b)] }),
        Kind::Equals(value) => {
            let value: Value = serde_json::from_str(value).expect("the key table holds valid JSON");
            json!({ "const": value })
        }
        Kind::Any => json!({}),
    }
}
