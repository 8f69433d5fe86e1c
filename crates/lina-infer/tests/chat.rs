//! Chat templates in the styles of published models, against what Hugging Face transformers makes of them
//! (`chat/render.py`).

use std::collections::BTreeMap;
use std::path::Path;

use lina_infer::{ChatMessage, ChatTemplate};
use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    template: String,
    messages: Vec<ChatMessage>,
    add_generation_prompt: bool,
    special_tokens: BTreeMap<String, String>,
    /// What is rendered, or
    text: Option<String>,
    /// what `raise_exception` says.
    error: Option<String>,
}

#[test]
fn templates_render_as_in_transformers() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/chat");
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
    let cases: Vec<Case> = serde_json::from_str(&read("cases.json")).unwrap();
    assert!(cases.iter().any(|case| case.error.is_some()) && cases.iter().any(|case| case.text.is_some()));
    for case in cases {
        let template = ChatTemplate::new(&read(&case.template), case.special_tokens).unwrap();
        let rendered = template.render(&case.messages, case.add_generation_prompt);
        let roles: Vec<_> = case.messages.iter().map(|message| &message.role).collect();
        let what = format!("{} with {roles:?}, {}", case.template, case.add_generation_prompt);
        match (rendered, case.text, case.error) {
            (Ok(rendered), Some(text), None) => assert_eq!(rendered, text, "{what}"),
            (Err(error), None, Some(refusal)) => {
                assert_eq!(error.to_string(), format!("the model's chat template refuses the messages: {refusal}"));
            }
            (rendered, text, error) => panic!("{what}: {rendered:?}, expected {text:?} or {error:?}"),
        }
    }
}
