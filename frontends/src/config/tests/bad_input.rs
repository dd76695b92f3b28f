//! Documents that are refused: each with its code, key path, and a word of the cure.

use super::super::{Code, Overrides, Scale, load, preset};
use super::{example, example_text, from, with_sets};

/// Document, code, key path, part of the printed error.
const CASES: &[(&str, Code, &str, &str)] = &[
    ("", Code::Syntax, "", "the text is empty"),
    ("   \n", Code::Syntax, "", "the text is empty"),
    ("[]", Code::Type, "", "a configuration is an object"),
    ("7", Code::Type, "", "a configuration is an object"),
    ("{\"hidden_size\": 64", Code::Syntax, "", "opens at 1:1; is the file truncated?"),
    ("{\"backbone\": {\"moe\": {\"layers\": [3, ", Code::Syntax, "", "a list"),
    ("{\"hidden_size\": ", Code::Syntax, "", "truncated"),
    ("{\"hidden_size", Code::Syntax, "", "truncated"),
    ("{\"hidden_size\": 64,}", Code::Syntax, "", "trailing commas"),
    ("{\"hidden_size\": 64 \"num_heads\": 2}", Code::Syntax, "", "expected comma"),
    ("{'hidden_size': 64}", Code::Syntax, "", "single-quoted"),
    ("{hidden_size: 64}", Code::Syntax, "", "expected string"),
    ("{\"hidden_size\": 0x40}", Code::Syntax, "", "hexadecimal"),
    ("{\"hidden_size\": +64}", Code::Syntax, "", "plus"),
    ("{\"hidden_size\": NaN}", Code::Syntax, "", "test.json:1:17"),
    ("{} // done", Code::Syntax, "", "comments are not allowed"),
    ("{} {}", Code::Syntax, "", "more than one"),
    ("{\u{a0}}", Code::Syntax, "", "U+00A0"),
    ("{\"_note\": \"a\nb\"}", Code::Syntax, "", "quotation mark missing"),
    ("{\"rms_norm_eps\": 1e999}", Code::Range, "", "too large"),
    ("{\"hidden_size\": 1, \"hidden_size\": 2}", Code::Duplicate, "hidden_size", "occurs twice"),
    ("{\"hiden_size\": 64}", Code::UnknownKey, "hiden_size", "help: did you mean `hidden_size`?"),
    ("{\"titans\": {\"cores\": \"swa\"}}", Code::UnknownKey, "titans.cores", "did you mean `core`?"),
    ("{\"layer_pattern\": \"GD\"}", Code::UnknownKey, "layer_pattern", "`backbone.layer_pattern` is a key"),
    ("{\"completely_else\": 1}", Code::UnknownKey, "completely_else", "_note"),
    ("{\"training\": {\"phases\": [{\"nam\": \"x\"}]}}", Code::UnknownKey, "training.phases.0.nam", "`name`"),
    ("{\"hidden_size\": \"64\"}", Code::Type, "hidden_size", "an integer from 1 to 65536"),
    ("{\"hidden_size\": 64.5}", Code::Type, "hidden_size", "an integer"),
    ("{\"hidden_size\": null}", Code::Type, "hidden_size", "is null"),
    ("{\"hidden_size\": {}}", Code::Type, "hidden_size", "is an object"),
    ("{\"titans\": 5}", Code::Type, "titans", "an object"),
    ("{\"titans\": []}", Code::Type, "titans", "an object"),
    ("{\"context_tiers\": {}}", Code::Type, "context_tiers", "a list"),
    ("{\"looping\": {\"enabled\": 1}}", Code::Type, "looping.enabled", "true or false"),
    ("{\"params\": {\"base\": \"big\"}}", Code::Type, "params.base", "350M"),
    ("{\"hidden_size\": 0}", Code::Range, "hidden_size", "1 to 65536"),
    ("{\"hidden_size\": -64}", Code::Range, "hidden_size", "is -64"),
    ("{\"vocab_size\": 99999999999999999999999}", Code::Range, "vocab_size", "4194304"),
    ("{\"num_hidden_layers\": 5000}", Code::Range, "num_hidden_layers", "1024"),
    ("{\"looping\": {\"prelude\": [0, 1, 2]}}", Code::Range, "looping.prelude", "a list of 2"),
    ("{\"backbone\": {\"moe\": {\"layers\": [3, -1]}}}", Code::Range, "backbone.moe.layers.1", "0 to 1023"),
    ("{\"titans\": {\"core\": \"swaa\"}}", Code::Word, "titans.core", "did you mean \"swa\"?"),
    ("{\"titans\": {\"core\": \"legacy_v51\"}}", Code::Unsupported, "titans.core", "not implemented"),
    ("{\"titans\": {\"step_rule\": \"normalized\"}}", Code::Word, "titans.step_rule", "\"normalised\"?"),
    ("{\"hidden_act\": \"gelu\"}", Code::Unsupported, "hidden_act", "\"swiglu\""),
    ("{\"hidden_act\": \"tanhish\"}", Code::Word, "hidden_act", "\"swiglu\""),
    ("{\"tie_word_embeddings\": false}", Code::Unsupported, "tie_word_embeddings", "true"),
    ("{\"byte_level\": {\"enabled\": true}}", Code::Unsupported, "byte_level.enabled", "not implemented"),
    (
        "{\"quantization\": {\"sherry_mode\": {\"enabled\": true}}}",
        Code::Unsupported,
        "quantization.sherry_mode.enabled",
        "false",
    ),
    (
        "{\"quantization\": {\"hgf_correction\": {\"enabled\": true}}}",
        Code::Unsupported,
        "quantization.hgf_correction.enabled",
        "false",
    ),
    ("{\"quantization\": {\"weight_scale\": \"max\"}}", Code::Word, "quantization.weight_scale", "absmean_per_row"),
    (
        "{\"quantization\": {\"weight_values\": [-1, 0, 2]}}",
        Code::Unsupported,
        "quantization.weight_values",
        "[-1,0,1]",
    ),
    ("{\"quantization\": {\"group_size\": 100}}", Code::Dimensions, "quantization.group_size", "multiple"),
    (
        "{\"quantization\": {\"activation_block_size\": 32}}",
        Code::Unsupported,
        "quantization.activation_block_size",
        "64 or 128",
    ),
    (
        "{\"quantization\": {\"activation_block_size\": 256, \"group_size\": 256}}",
        Code::Unsupported,
        "quantization.activation_block_size",
        "absmax_per_token",
    ),
    (
        "{\"quantization\": {\"activation_block_size\": 128, \"group_size\": 64}}",
        Code::Dimensions,
        "quantization.group_size",
        "multiple",
    ),
    (
        "{\"quantization\": {\"activation_method\": \"absmax_per_token\", \"group_size\": 96}}",
        Code::Unsupported,
        "quantization.group_size",
        "a multiple of 64",
    ),
    ("{\"backbone\": {\"layer_pattern\": \"\"}}", Code::Dimensions, "backbone.layer_pattern", "empty"),
    ("{\"backbone\": {\"layer_pattern\": \"GD XN\"}}", Code::Word, "backbone.layer_pattern", "did you mean `XM`?"),
    (
        "{\"backbone\": {\"layer_pattern_repeat\": 3}}",
        Code::Dimensions,
        "backbone.layer_pattern_repeat",
        "24 layers, not 28",
    ),
    (
        "{\"backbone\": {\"layer_counts\": {\"GD\": 13, \"XM\": 7, \"TM\": 4, \"SK\": 3}}}",
        Code::Dimensions,
        "backbone.layer_counts.GD",
        "the pattern gives 14",
    ),
    ("{\"backbone\": {\"layer_counts\": {\"GD\": 14}}}", Code::Dimensions, "backbone.layer_counts", "gives 7"),
    ("{\"backbone\": {\"moe\": {\"layers\": [28]}}}", Code::Dimensions, "backbone.moe.layers", "does not exist"),
    ("{\"backbone\": {\"moe\": {\"layers\": [3, 3]}}}", Code::Dimensions, "backbone.moe.layers", "twice"),
    (
        "{\"backbone\": {\"moe\": {\"num_experts_per_tok\": 17}}}",
        Code::Dimensions,
        "backbone.moe.num_experts_per_tok",
        "1 to 16",
    ),
    ("{\"head_dim\": 63}", Code::Dimensions, "head_dim", "an even number"),
    ("{\"num_heads\": 4096, \"head_dim\": 1024}", Code::Dimensions, "num_heads", "at most 262144"),
    ("{\"gated_deltanet\": {\"state_size\": 32}}", Code::Dimensions, "gated_deltanet.state_size", "head_dim is 64"),
    (
        "{\"head_dim\": 32, \"xlstm\": {\"memory_size_per_head\": [64, 64]}}",
        Code::Dimensions,
        "xlstm.memory_size_per_head",
        "[32, 32]",
    ),
    ("{\"looping\": {\"prelude\": [1, 3]}}", Code::Dimensions, "looping.prelude", "layer 0"),
    ("{\"looping\": {\"loop\": [5, 23]}}", Code::Dimensions, "looping.loop", "continue at layer 4"),
    ("{\"looping\": {\"loop\": [4, 3]}}", Code::Dimensions, "looping.loop", "does not continue"),
    ("{\"looping\": {\"coda\": [24, 26]}}", Code::Dimensions, "looping.coda", "the last layer is 27"),
    ("{\"looping\": {\"coda\": [24, 28]}}", Code::Dimensions, "looping.coda", "0 to 27"),
    ("{\"looping\": {\"loop_default\": 7}}", Code::Dimensions, "looping.loop_default", "1 to 6"),
    ("{\"looping\": {\"loop_range\": [3, 1]}}", Code::Dimensions, "looping.loop_range", "3 to 1"),
    ("{\"num_hidden_layers\": 2}", Code::Dimensions, "num_hidden_layers", "set looping.enabled to false"),
    ("{\"semantic_memory\": {\"vector_bits\": 5000}}", Code::Dimensions, "semantic_memory.vector_bits", "4096"),
    ("{\"hidden_size\": 10000}", Code::Dimensions, "hidden_size", "power of two times 16384"),
    ("{\"vocab_size\": 100, \"token_ids\": [99, 100]}", Code::Dimensions, "token_ids", "token 100 is outside"),
    (
        "{\"hidden_size\":65536,\"semantic_memory\":{\"vector_bits\":65536},\"num_hidden_layers\":1024,\
         \"backbone\":{\"moe\":{\"n_routed_experts\":1024,\"moe_intermediate_size\":262144}}}",
        Code::Dimensions,
        "hidden_size",
        "parameters",
    ),
    (
        r#"{"training": {"phases": [{"lr": 0.1}]}}"#,
        Code::Type,
        "training.phases.0.name",
        "one of pretrain, ctx_extend, sft, dpo",
    ),
    (
        r#"{"training": {"phases": [{"name": "sft"}, {"name": "sft"}]}}"#,
        Code::Word,
        "training.phases.1.name",
        "described twice",
    ),
    (r#"{"training": {"phases": [{"name": "rlhf"}]}}"#, Code::Word, "training.phases.0.name", "\"pretrain\""),
    (
        r#"{"training": {"phases": [{"name": "ctx_extend", "stages": [[64]]}]}}"#,
        Code::Range,
        "training.phases.0.stages.0",
        "main",
    ),
    (r#"{"training": {"phases": [{"name": "dpo", "beta": 0}]}}"#, Code::Range, "training.phases.0.beta", "beta"),
];

#[test]
fn bad_documents_say_what_is_wrong_and_where() {
    for (text, code, path, part) in CASES {
        let error = from(text).err().unwrap_or_else(|| panic!("{text} was accepted"));
        let printed = error.to_string();
        assert_eq!((error.code, error.key_path.as_str()), (*code, *path), "{text}\n{printed}");
        assert!(printed.to_lowercase().contains(&part.to_lowercase()), "{text}\n{printed}\nlacks {part}");
        assert!(error.place.is_some(), "{text}\n{printed}");
        let first = error.message.chars().next().unwrap();
        assert!(!first.is_uppercase() && !error.message.ends_with('.'), "{printed}");
    }
}

#[test]
fn errors_are_drawn_like_the_compilers() {
    let error = from("{\n  \"num_heads\": 2,\n\t\"hiden_size\": 2560\n}").unwrap_err();
    let expected = "\
error[C0103]: unknown key `hiden_size`
 --> test.json:3:2
  |
3 |  \"hiden_size\": 2560
  |  ^^^^^^^^^^^^
  = key: hiden_size
  = help: did you mean `hidden_size`?";
    assert_eq!(error.to_string(), expected);
    let error = from("{\"backbone\": {\"layer_pattern\": \"GD XM GX\"}}").unwrap_err();
    let place = error.place.clone().unwrap();
    assert_eq!((place.column, place.width), (39, 2), "{error}");
    let long = format!("{{\"_note\": \"{}\", \"hiden_size\": 1}}", "x".repeat(100_000));
    let error = from(&long).unwrap_err();
    assert!(error.to_string().len() < 600 && error.place.as_ref().unwrap().column > 100_000);
    let error = from(&format!("{{\"{}\": 1}}", "k\\u001b".repeat(500))).unwrap_err();
    assert!(error.to_string().len() < 1000 && !error.to_string().contains('\u{1b}'));
}

#[test]
fn bad_overrides_point_at_themselves() {
    let cases = [
        ("hidden_size", Code::Override, "key.path=value"),
        ("=3", Code::Override, "key.path=value"),
        ("hiden_size=3", Code::UnknownKey, "did you mean `hidden_size`?"),
        ("titans.cor=swa", Code::UnknownKey, "did you mean `core`?"),
        ("hidden_size.x=1", Code::UnknownKey, "plain value"),
        ("titans..core=swa", Code::UnknownKey, "unknown key ``"),
        ("hidden_size=big", Code::Type, "an integer"),
        ("hidden_size=", Code::Type, "an integer"),
        ("backbone.moe.layers.9=4", Code::Override, "no element 9 in a list of 7"),
        ("training.phases.0.lr=[1,", Code::Type, "a number"),
        ("titans.core=legacy_v51", Code::Unsupported, "not implemented"),
        ("head_dim=32", Code::Dimensions, "head_dim is 32"),
    ];
    let text = example_text("chimera-5.3.json");
    for (set, code, part) in cases {
        let error = with_sets(&text, &[set]).expect_err(set);
        assert_eq!(error.code, code, "{set}\n{error}");
        assert!(error.to_string().contains(part), "{set}\n{error}");
        assert!(code == Code::Dimensions || error.file == "--set", "{set}\n{error}");
    }
    assert_eq!("nono".parse::<Scale>().unwrap_err().split("; ").last(), Some("did you mean nano?"));
    let zero = Overrides { vocab_size: Some(0), ..Overrides::default() };
    assert_eq!(preset(Scale::Nano, &zero).unwrap_err().file, "--vocab");
    let missing = load(example("missing.json"), &Overrides::default()).unwrap_err();
    assert_eq!((missing.code, missing.place.clone()), (Code::Read, None));
    assert_eq!(load(example(""), &Overrides::default()).unwrap_err().code, Code::Read);
}
