//! The text of one line of JSON: a field, or a conversation.
//!
//! A line is an object. Nothing in it becomes a control token: roles and turns are written as plain text.

use serde_json::Value;

/// The field that is read where none is named, before `messages`.
const DEFAULT_FIELD: &str = "text";
/// The field of a conversation.
const MESSAGES: &str = "messages";

/// Text of a record: of the field `field` (`a.b` is field `b` of `a`), or of `text` or else `messages`. A string is taken as it is; a list
/// of messages is written as `ROLE: CONTENT` and a line end each, with an empty line in between. Content is a string, null, or a list of
/// parts of which those with `text` count.
///
/// # Errors
/// What was found and what was expected.
pub fn record_text(line: &[u8], field: Option<&str>) -> Result<String, String> {
    let value = record(line)?;
    match found(&value, field)? {
        (_, Value::String(text)) => Ok(text.clone()),
        (name, Value::Array(list)) => {
            let written = messages(list).map_err(|what| format!("field {name:?}: {what}"))?;
            Ok(written.iter().enumerate().map(|(i, m)| m.head(i) + &m.body()).collect())
        }
        (name, other) => Err(format!("field {name:?} is {}, expected a string or a list of messages", kind(other))),
    }
}

/// The object of a line.
pub(super) fn record(line: &[u8]) -> Result<Value, String> {
    let value: Value = serde_json::from_slice(line).map_err(|e| {
        // The place inside the one line; the caller adds which line that is.
        let text = e.to_string();
        let what = text.split(" at line ").next().unwrap_or_default().to_owned();
        format!("column {}: {what}, expected one JSON object a line", e.column())
    })?;
    match &value {
        Value::Object(_) => Ok(value),
        other => Err(format!("found {}, expected a JSON object", kind(other))),
    }
}

/// The name and value of the field to read.
pub(super) fn found<'a>(record: &'a Value, field: Option<&'a str>) -> Result<(&'a str, &'a Value), String> {
    let (name, found) = match field {
        Some(path) => (path, lookup(record, path)),
        None => match record.get(DEFAULT_FIELD) {
            Some(text) => (DEFAULT_FIELD, Some(text)),
            None => (MESSAGES, record.get(MESSAGES)),
        },
    };
    found.map(|value| (name, value)).ok_or_else(|| {
        let known = known(record);
        let wanted = field.unwrap_or("text\" or \"messages");
        format!("no field \"{wanted}\", the record has {known:?}; name the field by --field")
    })
}

/// Some names of the fields of a record.
pub(super) fn known(record: &Value) -> Vec<&str> {
    record.as_object().map_or(vec![], |fields| fields.keys().map(String::as_str).take(8).collect())
}

fn lookup<'a>(value: &'a Value, path: &str) -> Option<&'a Value> {
    value.get(path).or_else(|| path.split('.').try_fold(value, |value, key| value.get(key)))
}

/// A message of a conversation.
pub(super) struct Message {
    /// Who speaks.
    pub role: String,
    /// What is said.
    pub text: String,
}

impl Message {
    /// What stands in front of what is said by message `number`, counted from 0.
    pub(super) fn head(&self, number: usize) -> String {
        format!("{}{}:", if number > 0 { "\n" } else { "" }, self.role)
    }

    /// What is said, up to the line end behind it.
    pub(super) fn body(&self) -> String {
        format!(" {}\n", self.text)
    }
}

/// The messages of a list; those whose content is null are left out.
pub(super) fn messages(list: &[Value]) -> Result<Vec<Message>, String> {
    let mut out = vec![];
    for (message, number) in list.iter().zip(1..) {
        let role = message.get("role").and_then(Value::as_str);
        let role = role.ok_or_else(|| format!("message {number} has no \"role\", expected role and content"))?;
        let text = match message.get("content") {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Array(parts)) => parts.iter().filter_map(|part| part.get("text")?.as_str()).collect(),
            Some(Value::Null) => continue,
            Some(other) => {
                return Err(format!("the content of message {number} is {}, expected a string", kind(other)));
            }
            None => return Err(format!("message {number} has no \"content\", expected role and content")),
        };
        out.push(Message { role: role.to_owned(), text });
    }
    Ok(out)
}

pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_and_conversations_become_text() {
        let read = |line: &str, field| record_text(line.as_bytes(), field);
        assert_eq!(read(r#"{"text": "a\nb", "messages": []}"#, None).unwrap(), "a\nb");
        assert_eq!(read(r#"{"doc": {"body": "x"}}"#, Some("doc.body")).unwrap(), "x");
        assert_eq!(read(r#"{"a.b": "dotted"}"#, Some("a.b")).unwrap(), "dotted");
        let chat = r#"{"messages": [{"role": "user", "content": "hi"}, {"role": "tool", "content": null},
            {"role": "assistant", "content": [{"type": "text", "text": "he"}, {"type": "image"}, {"text": "llo"}]}]}"#;
        assert_eq!(read(chat, None).unwrap(), "user: hi\n\nassistant: hello\n");
        assert_eq!(read(r#"{"text": "<|endoftext|>"}"#, None).unwrap(), "<|endoftext|>");
    }

    #[test]
    fn records_that_cannot_serve_are_explained() {
        for (line, field, what) in [
            ("{\"text\": \"a\"", None, "column 12: EOF while parsing an object, expected one JSON object"),
            ("[1]", None, "found a list, expected a JSON object"),
            ("{\"txt\": 1}", None, "no field \"text\" or \"messages\", the record has [\"txt\"]; name the field"),
            ("{\"text\": 3}", None, "field \"text\" is a number"),
            ("{\"text\": \"a\"}", Some("body"), "no field \"body\""),
            ("{\"messages\": [{\"content\": \"a\"}]}", None, "message 1 has no \"role\""),
            ("{\"messages\": [{\"role\": \"a\"}]}", None, "message 1 has no \"content\""),
            ("{\"messages\": [{\"role\": \"a\", \"content\": 1}]}", None, "is a number"),
            ("{\"text\": \"\u{7f}\"} x", None, "trailing characters"),
        ] {
            let error = record_text(line.as_bytes(), field).unwrap_err();
            assert!(error.contains(what), "{line}: {error}");
        }
        assert!(record_text(b"{\"text\": \"\xff\"}", None).is_err());
        let deep = [b"[".repeat(100_000), b"]".repeat(100_000)].concat();
        assert!(record_text(&deep, None).unwrap_err().contains("recursion"));
    }
}
