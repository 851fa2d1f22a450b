# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 2. Causal tracing, and attribution patching with a miss rate
#
# **Question.** Through which layers and positions does the behaviour pass? And how does one search a model that has
# too many parts to patch each?
#
# **What we do.** First we restore whole blocks at single positions, which gives a map of where the information is
# at each depth. Then we screen all heads and all neurons with gradients, which costs a few passes, and check that
# screen by patching its strongest parts *and a random sample of the others* exactly.

# %%
import pandas as pd

import mech_align as ma
from mech_align.organisms import organism_pairs

model = ma.load_model("organism:suppressor/tuned")
pairs = ma.load_pairs(organism_pairs("suppressor"))

# %% [markdown]
# ## Tracing by layer and position
#
# In a run on the corrupt prompt, one part of one layer gets its clean value back at one position. Averages over
# positions make sense only where the positions mean the same in each prompt, so we take pairs that end alike.
# Positions are counted from the end: -1 is where the answer is about to be said.

# %%
alike = pairs.take(i for i, prompt in enumerate(pairs.clean) if "for work" in prompt)
trace = ma.causal_tracing(model, alike, parts=("resid_pre", "attn_out", "mlp_out"))
ma.heatmap(trace, facet="part")

# %% [markdown]
# **How to read it.** `resid_pre` is everything that has been computed before a layer: it shows where the
# information *is*. Attention and MLP show what a layer *adds*: there the information is moved or made. A label with
# `~` stands for different tokens in different prompts.
#
# Before layer 0 all of it is in the one word that differs. At the end all of it is at the last position, because
# from there the answer is read; that the last rows are 1 is no discovery, and would be so in any model. The finding
# is what lies between: which layer, of which kind, brings it to the end.
#
# The same as curves, now over all pairs. `"differs"` are the positions at which clean and corrupt are not the same
# token, wherever they stand in a prompt.

# %%
differs = ma.causal_tracing(model, pairs, parts=("resid_pre", "attn_out", "mlp_out"), positions="differs")
ma.plots.lines(differs, title="At the word that differs")

# %%
last = ma.causal_tracing(model, pairs, parts=("resid_pre", "attn_out", "mlp_out"), positions="last")
ma.plots.lines(last, title="At the last position")

# %% [markdown]
# Look at the layers in the middle. If neither place holds much there, then the information is not gone: it may have
# been copied to many positions, and restoring any single one is outvoted by the others. To see it, restore all
# positions together. (For `resid_pre` that is 1 by definition, one more check; look at attention and MLP.)

# %%
everywhere = ma.causal_tracing(model, pairs, parts=("resid_pre", "attn_out", "mlp_out"), positions="all")
ma.plots.lines(everywhere, title="At all positions together")

# %% [markdown]
# ### What could fool us
#
# - **Redundancy**, as just seen: a small effect at one place does not mean that the place knows nothing.
# - **The kind of corruption.** Here the corrupt run is another prompt. `corruption="noise"` blurs the embeddings
#   instead; it needs no second prompt, but takes the model to places where it has never been, and the maps can
#   differ.
# - **Windows.** `window=3` restores neighbouring layers together. It makes weak paths visible, and blurs where they
#   are.

# %%
noised = ma.causal_tracing(
    model, pairs, parts=("resid_pre", "attn_out", "mlp_out"), positions="last", corruption="noise", noise_draws=3
)
ma.plots.lines(noised, title="At the last position, corrupted by noise at the word that differs")

# %% [markdown]
# Noise asks something else: the noised word means nothing in particular, where the corrupt word means harm. If a
# curve here differs from the one above, then noise reaches the answer by other routes as well. If one leaves the
# range from 0 to 1 by far, noise may have hardly moved the metric, so that the gap by which we divide is small. So
# look at the gap first, and at the number of pairs that have none:

# %%
noised.values[["clean", "corrupt"]].mean().to_pandas(), noised.provenance["degenerate"]

# %% [markdown]
# ## Attribution patching: a screen for many parts
#
# The effect of a patch is estimated as the change of the activation times the gradient of the metric. One backward
# pass gives a score for *every* part at once. It is a first-order guess: where the metric saturates, or where heads
# only work together, it is wrong. So no score is reported here without exact patches beside it: of the `confirm`
# strongest, and of `sample` others, drawn at random.

# %%
screened = ma.attribution_patching(model, pairs, part="heads", confirm=8, sample=20)
ma.plots.screen(screened)

# %% [markdown]
# **How to read it.** Each point was patched exactly. On the dotted line a score would equal its effect. Points far
# above or below show where the first-order guess fails, and by how much. The order is what matters for a screen:
# strong parts must be to the left or right, not in the middle.
#
# The random sample of the rest tells what the screen missed: how many strong heads there may be that it ranked low.
# Of the numbers below, `found` heads of the top are larger than `threshold`, `sample_large` of the sample are too;
# from these come `missed`, a number of heads, and `miss_rate`, the share of the large ones that the screen missed.
# Look at their intervals and not only at the estimates: none seen in a sample is not none.

# %%
pd.Series(screened.provenance["screen"])

# %% [markdown]
# Averaging the gradient over several steps from corrupt to clean helps where the metric saturates. A layer's scores
# then sum to the effect of patching that layer whole, so single heads that work together share the joint effect
# among them, and a score may exceed by far what the head does alone. With more steps a score is nearer to the
# head's *share of its layer*, and not always to its own effect: the exact patches are there to tell.

# %%
stepped = ma.attribution_patching(model, pairs, part="heads", steps=8, confirm=8, sample=20)
ma.plots.screen(stepped, title="Eight steps")

# %% [markdown]
# ## Where the screen pays: neurons
#
# A model has dozens of neurons for each head, the large ones hundreds, and patching each of them exactly takes as
# many runs.

# %%
neurons = ma.attribution_patching(model, pairs, part="neurons", confirm=15, sample=40)
ma.plots.screen(neurons)

# %%
neurons.values[["exact"]].to_dataframe().dropna().sort_values("exact", key=abs, ascending=False).head(5)

# %% [markdown]
# Compare the axes with those of the heads above: the strongest neuron of a model in which no neuron carries the
# behaviour is still the strongest. "Large" is by default a tenth of the largest exact effect *of this screen*; give
# `threshold=` when you have a size in mind that would matter to you.

# %%
pd.Series(neurons.provenance["screen"])

# %% [markdown]
# A sample of 40 from so many leaves room for many missed neurons just above the threshold: the upper end of
# `missed_interval` says how many. A larger `sample` narrows it, at the price of one patch each.
