# %% [markdown]
# # A tour in ten cells
# Run it in a notebook (Jupyter and VS Code read the `# %%` marks), or as `python scripts/tour.py`.
# It takes about half a minute on two CPU cores and needs no network.

# %% Which numbers share a mean? In LayerNorm a token's row, in BatchNorm a feature's column.
import torch

import gpt

x = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]])  # (B=1, T=3, C=3)
print(gpt.norms.LayerNorm(3)(x))
print(gpt.norms.BatchNorm(3)(x))

# %% Why torch.var does not reproduce LayerNorm: it divides by n − 1, LayerNorm by n.
print(gpt.norms.LayerNorm(3, unbiased=True)(x) / gpt.norms.LayerNorm(3)(x))  # √(2/3)

# %% A configuration: any setting of `python scripts/train.py`, as text.
cfg = gpt.compose(
    "norm=rbn", "tokenizer=bytes", "model.n_layer=2", "model.n_embd=32", "model.block_size=64",
    "train.batch_size=8", "train.steps=40", "train.eval_every=20", "train.eval_tokens=2048",
    "wandb.mode=disabled", "device=cpu", "run_dir=runs/tour",
)  # fmt: skip

# %% Make the corpus's tokens, and the model with its initial weights.
data = gpt.prepare(cfg)
model = gpt.build_model(cfg, data.tokenizer.n_vocab)
print(model.final_norm)

# %% A training loop of your own. `norm_step` does for norms what the trainer does.
batches = gpt.TrainBatches(data.train.ids, 8, 1, cfg.model.block_size, cfg.seed)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(1, 21):
    with gpt.norm_step(model, step, 20) as norms:
        for inputs, targets in batches.at(step, torch.device("cpu")):
            _, loss = model(inputs, targets)
            (loss + norms.extra_loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
print(f"loss after 20 steps: {loss.item():.3f} nats a token")

# %% What the norms see: statistics of one forward and backward pass.
with gpt.norm_step(model, 20, 20), gpt.collect(model) as record:
    model(inputs, targets)[1].backward()
for site, values in gpt.to_numbers(record)["sites"].items():
    print(f"{site:12} rms before {values['before']['rms']:.3f}, after {values['after']['rms']:.3f}")

# %% Statistics also work for a model that is not ours.
theirs = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
with gpt.collect(theirs) as record:
    theirs(x).sum().backward()
print(gpt.to_numbers(record)["sites"]["1"]["before"])

# %% Train. The same call again finds the run finished.
summary = gpt.train(cfg)

# %% Load the trained model and generate text.
model = gpt.load_model("runs/tour")
tokenizer = gpt.load_tokenizer("runs/tour/tokenizer.json")
print(gpt.generate(model, tokenizer, "The ", max_new_tokens=40))

# %% Make a page of one run or several: runs/tour/report.html.
gpt.report("runs/tour")
