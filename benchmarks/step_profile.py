"""Where does the time of a micro-batch go? The operators of one forward and backward of sft_v1.py's model on a CPU.

    python benchmarks/train.py --quick && python benchmarks/step_profile.py      one core, about two minutes

SmolLM2-135M in bfloat16 on one thread, real conversations of benchmarks/work/train concatenated up to TOKENS, after
WARM micro-batches, in which the process gets its memory. Prints torch.profiler's table; the shares of the linear
layers' matmuls, of attention and of all else; the rates of matmuls, of attention, and of torch's own attention kernel
on the same documents. machine_share of train.py counts every operation at the rate of matmuls.
"""

import statistics
import time

import common

from sft import settings
from sft.training import cpu, dataloader
from sft.training import model as sft_model

# ---- Size ----
TOKENS = 4096  # of the micro-batch, at most
WARM = 3  # micro-batches before the one that counts
ROWS = 12  # of the table

# ==== Measurement ====

FOLDER = common.WORK / "train"


def measure():
    """Return (the profiler's table, the RESULT line's figures); runs in a child."""
    import datasets
    import numpy as np
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.set_num_threads(1)
    cpu.set_up_memory()  # as a rank on a CPU does
    stored, rows, tokens = datasets.load_from_disk(FOLDER / "prepared")["train"].with_format("numpy"), [], 0
    for row in stored:
        if tokens + len(row["input_ids"]) <= TOKENS:
            rows.append((row["input_ids"].astype(np.int64), row["assistant_masks"]))
            tokens += len(row["input_ids"])
    model = sft_model.load_model(str(FOLDER / "base")).to(torch.bfloat16)
    for _ in range(WARM):
        model(dataloader.concatenate(rows)).backward()
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiled:
        model(dataloader.concatenate(rows)).backward()
    table = profiled.key_averages()
    lines = {line.key: line for line in table}
    whole = sum(line.self_cpu_time_total for line in table) / 1e6
    matmul = lines["aten::mm"].self_cpu_time_total / 1e6
    attention = sum(lines[f"CausalAttention{part}"].cpu_time_total for part in ("", "Backward")) / 1e6
    config = model.causal_lm.config
    heads, kv_heads, layers = config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers
    head_dim = config.hidden_size // heads
    lengths = [len(ids) for ids, _ in rows]
    # Two matmuls forward and five backward (it recomputes the scores), each over half of a square.
    operations = 7 * sum(length**2 for length in lengths) * head_dim * heads
    return table.table(sort_by="self_cpu_time_total", row_limit=ROWS, max_name_column_width=50), {
        "tokens": tokens,
        "matmul_share": round(matmul / whole, 3),
        "attention_share": round(attention / whole, 3),
        "else_share": round(1 - (matmul + attention) / whole, 3),
        "matmul_gflops": round(lines["aten::mm"].flops / matmul / 1e9, 1),
        "attention_gflops": round(operations * layers / attention / 1e9, 1),
        "torch_attention_gflops": round(operations / torchs_attention(lengths, heads, kv_heads, head_dim) / 1e9, 1),
    }


def torchs_attention(lengths, heads, kv_heads, head_dim, calls=5):
    """Return the seconds of scaled_dot_product_attention, forward and backward, on documents of `lengths`; a median."""
    import torch
    import torch.nn.functional as F

    seconds = []
    for _ in range(calls + 1):
        spent = 0.0
        for length in lengths:
            shapes = ((1, length, n, head_dim) for n in (heads, kv_heads, kv_heads))
            parts = [torch.randn(s, dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for s in shapes]
            begin = time.perf_counter()
            output = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
            output.backward(output)
            spent += time.perf_counter() - begin
        seconds.append(spent)
    return statistics.median(seconds[1:])


def main(args):
    """Profile one micro-batch and print the RESULT line."""
    if not (FOLDER / "base").is_dir():
        raise SystemExit(f"{FOLDER} is missing. Run benchmarks/train.py first, --quick will do.")
    common.machine()
    table, figures = common.in_child(measure)
    print(table)
    common.result(**figures)


if __name__ == "__main__":
    main(settings.from_flags(globals()))
