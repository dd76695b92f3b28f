//! Conversations and preferences as texts of which some parts count.
//!
//! What counts is what the assistant says, from the space behind the name of its role to the line end. The text of a conversation is that of
//! [`super::jsonl::record_text`].

use serde_json::Value;

use super::jsonl::{Message, found, kind, known, messages, record};

/// The role whose messages are answers.
const ASSISTANT: &str = "assistant";
/// The role of a prompt that is a mere string.
const USER: &str = "user";
/// The field of a conversation.
const MESSAGES: &str = "messages";

/// A part of a text; neighbours differ in whether they count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The text.
    pub text: String,
    /// Whether a model learns to write it.
    pub counts: bool,
}

/// Two continuations of one prompt, prompt included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Preference {
    /// The better one.
    pub chosen: Vec<Part>,
    /// The other.
    pub rejected: Vec<Part>,
}

/// The conversation of a record: of the field `field`, or of `messages`.
///
/// # Errors
/// What was found and what was expected.
pub fn conversation(line: &[u8], field: Option<&str>) -> Result<Vec<Part>, String> {
    let value = record(line)?;
    match found(&value, Some(field.unwrap_or(MESSAGES)))? {
        (name, Value::Array(list)) => Ok(parts(&listed(name, list)?)),
        (name, other) => Err(format!("field {name:?} is {}, expected a list of messages", kind(other))),
    }
}

/// The preference of a record with the fields `prompt`, `chosen` and `rejected`. Each is a list of messages, or a string, which is then a
/// message of the user (prompt) or of the assistant (both others).
///
/// # Errors
/// What was found and what was expected.
pub fn preference(line: &[u8]) -> Result<Preference, String> {
    let value = record(line)?;
    let read = |name: &str, role: &str| match value.get(name) {
        Some(Value::Array(list)) => listed(name, list),
        Some(Value::String(text)) => Ok(vec![Message { role: role.to_owned(), text: text.clone() }]),
        Some(other) => Err(format!("field {name:?} is {}, expected a string or a list of messages", kind(other))),
        None => {
            let known = known(&value);
            Err(format!("no field {name:?}, the record has {known:?}; a preference has prompt, chosen and rejected"))
        }
    };
    let answer = |name: &str| -> Result<Vec<Part>, String> {
        let given = read("prompt", USER)?;
        let said = read(name, ASSISTANT)?;
        if !said.iter().any(|m| m.role == ASSISTANT) {
            return Err(format!("field {name:?} has no message of the role {ASSISTANT:?}, expected an answer"));
        }
        let answers = said.len();
        let all: Vec<Message> = given.into_iter().chain(said).collect();
        let prompt = all.len() - answers;
        Ok(joined(all.iter().enumerate().map(|(i, m)| (i, m, i >= prompt && m.role == ASSISTANT))))
    };
    Ok(Preference { chosen: answer("chosen")?, rejected: answer("rejected")? })
}

fn listed(name: &str, list: &[Value]) -> Result<Vec<Message>, String> {
    messages(list).map_err(|what| format!("field {name:?}: {what}"))
}

fn parts(all: &[Message]) -> Vec<Part> {
    joined(all.iter().enumerate().map(|(i, m)| (i, m, m.role == ASSISTANT)))
}

fn joined<'a>(all: impl Iterator<Item = (usize, &'a Message, bool)>) -> Vec<Part> {
    let mut out: Vec<Part> = vec![];
    for (number, message, counts) in all {
        for (text, counts) in [(message.head(number), false), (message.body(), counts)] {
            match out.last_mut() {
                Some(last) if last.counts == counts => last.text.push_str(&text),
                _ => out.push(Part { text, counts }),
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::jsonl::record_text;
    use super::*;

    fn shown(parts: &[Part]) -> Vec<(&str, bool)> {
        parts.iter().map(|p| (&p.text[..], p.counts)).collect()
    }

    #[test]
    fn what_the_assistant_says_counts() {
        let line = br#"{"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "hello"}, {"role": "user", "content": "bye"}]}"#;
        let parts = conversation(line, None).expect("a conversation");
        let want = [("system: be kind\n\nuser: hi\n\nassistant:", false), (" hello\n", true), ("\nuser: bye\n", false)];
        assert_eq!(shown(&parts), want);
        let whole: String = parts.iter().map(|p| &p.text[..]).collect();
        assert_eq!(Ok(whole), record_text(line, None));
        for (line, what) in [
            (r#"{"text": "x"}"#, "no field \"messages\""),
            (r#"{"messages": "x"}"#, "is a string, expected a list of messages"),
            (r#"{"messages": [{"role": "user"}]}"#, "message 1 has no \"content\""),
        ] {
            let error = conversation(line.as_bytes(), None).expect_err("no conversation");
            assert!(error.contains(what), "{error}");
        }
    }

    #[test]
    fn preferences_share_their_prompt() {
        let line = br#"{"prompt": [{"role": "user", "content": "2+2?"}], "chosen": "4", "rejected": [{"role": "assistant", "content": "5"}]}"#;
        let found = preference(line).expect("a preference");
        assert_eq!(shown(&found.chosen), [("user: 2+2?\n\nassistant:", false), (" 4\n", true)]);
        assert_eq!(shown(&found.rejected), [("user: 2+2?\n\nassistant:", false), (" 5\n", true)]);
        for (line, what) in [
            (r#"{"prompt": "a", "chosen": "b"}"#, "no field \"rejected\", the record has ["),
            (r#"{"chosen": "a", "rejected": "b"}"#, "no field \"prompt\""),
            (r#"{"prompt": "a", "chosen": 1, "rejected": "b"}"#, "field \"chosen\" is a number"),
            (
                r#"{"prompt": "a", "chosen": [], "rejected": "b"}"#,
                "\"chosen\" has no message of the role \"assistant\"",
            ),
        ] {
            let error = preference(line.as_bytes()).expect_err("no preference");
            assert!(error.contains(what), "{error}");
        }
    }
}
