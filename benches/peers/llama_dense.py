"""llama.cpp on the dense stack: 28 layers of 2560 and 6912 columns, random ternary weights as TQ2_0, one stream.

The model is written as a GGUF file into a temporary folder. Decoding counts the bytes of all layers, reading a prompt their
multiply-accumulates; the small embedding and head are not counted.
"""

import ctypes
import os
import tempfile

import peer

WIDTH, INNER, LAYERS, HEADS, VOCAB = 2560, 6912, 28, 20, 256
PROMPT, DECODED = 512, 16
MATRICES = {
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (WIDTH, WIDTH),
    "attn_v": (WIDTH, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_gate": (INNER, WIDTH),
    "ffn_up": (INNER, WIDTH),
    "ffn_down": (WIDTH, INNER),
}


def write(path, gguf, numpy):
    """Write the model; returns the bytes of its layers."""
    random = numpy.random.default_rng(1)
    out = gguf.GGUFWriter(path, "llama")
    out.add_context_length(PROMPT + DECODED)
    out.add_embedding_length(WIDTH)
    out.add_block_count(LAYERS)
    out.add_feed_forward_length(INNER)
    out.add_head_count(HEADS)
    out.add_head_count_kv(HEADS)
    out.add_rope_dimension_count(WIDTH // HEADS)
    out.add_layer_norm_rms_eps(1e-6)
    out.add_vocab_size(VOCAB)
    out.add_tokenizer_model("no_vocab")
    kind = gguf.GGMLQuantizationType.TQ2_0
    packed = {}
    for m, n in set(MATRICES.values()):
        ternary = random.integers(-1, 2, size=(m, n)).astype(numpy.float32) * 0.02
        packed[m, n] = gguf.quants.quantize(ternary, kind)
    ones = numpy.ones(WIDTH, dtype=numpy.float32)
    embedding = random.standard_normal((VOCAB, WIDTH)).astype(numpy.float32)
    out.add_tensor("token_embd.weight", embedding)
    out.add_tensor("output.weight", embedding)
    out.add_tensor("output_norm.weight", ones)
    total = 0
    for layer in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            out.add_tensor(f"blk.{layer}.{norm}.weight", ones)
        for name, shape in MATRICES.items():
            out.add_tensor(f"blk.{layer}.{name}.weight", packed[shape], raw_dtype=kind)
            total += packed[shape].nbytes
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return total


def main():
    args = peer.options(__doc__)
    found = peer.need("numpy", "gguf", "llama_cpp")
    if found is None:
        return
    numpy, gguf, llama = found
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "dense.gguf")
        layers = write(path, gguf, numpy)
        log = llama.llama_log_callback(lambda level, text, data: None)
        llama.llama_log_set(log, ctypes.c_void_p(0))
        llama.llama_backend_init()
        params = llama.llama_model_default_params()
        params.n_gpu_layers = 0
        model = llama.llama_model_load_from_file(path.encode(), params)
        assert model, "llama.cpp does not load the model"
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = PROMPT + DECODED, PROMPT, PROMPT
        params.n_threads = params.n_threads_batch = args.threads
        context = llama.llama_init_from_model(model, params)
        assert context, "llama.cpp makes no context"

        def decode(count, at):
            batch = llama.llama_batch_init(count, 0, 1)
            batch.n_tokens = count
            for i in range(count):
                batch.token[i], batch.pos[i] = (i * 31 + 7) % VOCAB, at + i
                batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, i == count - 1
            failed = llama.llama_decode(context, batch)
            llama.llama_batch_free(batch)
            assert failed == 0, f"llama_decode returned {failed}"
            logits = numpy.ctypeslib.as_array(llama.llama_get_logits(context), shape=(VOCAB,))
            assert numpy.isfinite(logits).all(), "logits are not finite"

        def fresh():
            llama.llama_memory_clear(llama.llama_get_memory(context), True)

        def prompt():
            fresh()
            decode(PROMPT, 0)

        def tokens():
            fresh()
            for i in range(DECODED):
                decode(1, i)

        each = sum(m * n for m, n in MATRICES.values())
        time = peer.seconds(tokens, args.quick)
        peer.figure("llama.decode.3b", DECODED * layers / time * 1e-9, "GB/s", "decode.3b")
        time = peer.seconds(prompt, args.quick)
        peer.figure("llama.prefill.3b", PROMPT * LAYERS * each / time * 1e-9, "GMAC/s", "prefill.3b")


if __name__ == "__main__":
    main()
