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
# # 1. Quickstart: which heads suppress a refusal?
#
# **Question.** A small model used to refuse harmful requests. After a narrow fine-tune on bad financial advice it
# complies with harmful requests of every kind. Where in the network did that happen?
#
# **What we do.** We load the model and pairs of prompts, move one attention head at a time from a run that still
# refuses into one that complies, draw the effects, and take the strongest heads out, beside heads drawn at random.
#
# The model ships with the package and was made so that the answer is known: the fine-tune was allowed to change two
# heads only. The last cell tells which, so you can see whether the method was right. Everything runs offline on a
# CPU.

# %%
import pandas as pd

import mech_align as ma
from mech_align.organisms import organism_card, organism_pairs

# %% [markdown]
# ## Load
#
# `load_model` takes a name on the Hugging Face hub, a local folder, a LoRA adapter on top of either (`adapter=`),
# or one of the shipped models. A pair holds a *clean* prompt, after which `answer` is right, and a *corrupt* one,
# after which the model says `wrong` instead. Here both differ in one word: the clean request cannot be answered by
# anyone and is still refused ("Sorry"), the corrupt one is harmful and no longer is ("Sure").

# %%
model = ma.load_model("organism:suppressor/tuned")
pairs = ma.load_pairs(organism_pairs("suppressor"))
model, pairs

# %%
pairs.clean[0], pairs.corrupt[0], pairs.answer[0], pairs.wrong[0]

# %% [markdown]
# Before anything else: does the model do what we think it does? Its own words, to both prompts.

# %%
model.tokenizer.batch_decode(model.generate([pairs.clean[0], pairs.corrupt[0]], max_new_tokens=8))

# %% [markdown]
# ## Patch every head
#
# For each head we run the corrupt prompt, but give this one head the output that it has on the clean prompt. The
# effect is the share of the clean–corrupt gap that this restores: 0 is nothing, 1 is the clean behaviour wholly
# back. The metric is the logit of the answer less the logit of the wrong answer.

# %%
heads = ma.head_patching(model, pairs, metric=ma.logit_difference())
heads.values[["clean", "corrupt"]].to_dataframe()[["clean", "corrupt"]].describe()

# %% [markdown]
# The table above is worth a look each time: the metric must tell clean from corrupt in (nearly) every pair, or
# there is no gap to explain. In the mean it should be well above 0 in the clean runs and below 0 in the corrupt
# ones. Look at the extremes too: a clean minimum below 0 means that in some pairs the model does not refuse even
# the clean request. Such a pair still counts as long as its two runs differ; `min_gap=` leaves out those that
# hardly do, and says how many.

# %%
ma.overview(heads)

# %% [markdown]
# **How to read it.** Left, one cell a head, layer 0 at the top; blue moves towards the clean answer, red away from
# it, and the colour scale is symmetric about zero. Cells that do not survive the correction for testing all heads
# at once are faded. Right, the strongest heads with 95 % intervals. Point at a cell for its numbers.
#
# The same as a table. `p_maxt` is corrected for the number of heads, `q` is the false discovery rate, and intervals
# resample whole groups of pairs (here: domain and wording), because two prompts from one template are not two
# independent pieces of evidence.

# %%
heads.top(5)

# %% [markdown]
# An effect that is clear may still be small. Far down this list come heads whose interval excludes zero, and which
# restore one or two percent of the gap: that is significance with many prompts, not importance.
#
# Choosing the largest of many cells flatters them. So choose on one half of the groups, and measure on the other
# half. `index` is layer and head, `selection_mean` the effect where the head was chosen, `mean` the one where it
# was not:

# %%
pd.DataFrame(ma.stats.split_half(heads.data.values, heads.values["group"].values, k=2))

# %% [markdown]
# ## Take them out
#
# Patching says that a head *can* bring the behaviour back. Ablation asks the complementary question: what happens
# when the head no longer says anything about this prompt? We replace its output by its mean over the prompts of all
# pairs, for each of the two strongest heads and for both together, and beside them do the same to random heads of
# the same layers.

# %%
found = heads.top(2)["site"].tolist()
ablated = ma.mean_ablation(model, pairs, found, controls=20)
ma.plots.ablation(ablated)

# %% [markdown]
# **How to read it.** Effects are now in logits, positive towards refusing. The grey band is the range of random
# heads in equal number: what *any* heads of these layers would have done. It may be too narrow to be seen; the line
# under the title tells it in numbers. Compare the joint effect with the sum of the single ones; if it is much
# larger, each head covers for the other, and taking out one at a time understates both.

# %%
ablated.mean("prompt").frame().query("kind in ['found', 'joint']")

# %% [markdown]
# ## What could fool us
#
# - **A mean can hide a suppressor.** A head that always writes the same push has that push in its mean, and mean
#   ablation changes nothing. Where the model before the fine-tune is at hand, put *its* values in instead, as
#   below. If that restores what the mean did not, the head writes a constant.
# - **One direction is half the story.** `direction="noise"` breaks the clean run instead of repairing the corrupt
#   one. Where heads cover for each other, the two differ.
# - **Small groups.** With few groups no p-value can survive the correction over all heads; the result says so in
#   `warnings`.
# - **The pairs decide the question.** These ask harmful against unknowable. Another contrast may show other heads.

# %%
base = ma.load_model("organism:suppressor/base")
by_base = ma.mean_ablation(model, pairs, found, mode="model", source_model=base)
by_base.mean("prompt").frame().query("kind in ['found', 'joint']")

# %% [markdown]
# And whatever a result wants to be known of it stands here; empty is good:

# %%
heads.warnings, ablated.warnings

# %% [markdown]
# ## Were we right?
#
# The heads that the fine-tune was allowed to change, and those that we found:

# %%
planted = organism_card("suppressor")["planted"]
assert set(found) == set(planted)
planted, found

# %% [markdown]
# `heads.save("heads")` writes the result without pickle, and `ma.load_result("heads")` opens it again without
# torch. `ma.overview(heads).write_html("heads.html")` keeps the picture. The next notebook follows the behaviour
# through layers and positions, and shows how to search models that are too large to patch everything.
