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
# # 3. Direct logit attribution and the logit lens
#
# **Question.** Patching told *that* a part matters. Which parts write the answer themselves, into which direction,
# and after which layer could the answer be read?
#
# **What we do.** The logits are a linear read-out of a sum: the embedding plus what each head and each MLP added.
# Direct logit attribution takes the sum apart. The logit lens reads it off early, after each layer. Both only look;
# nothing is changed in the model, so both are cheap.

# %%
import mech_align as ma
from mech_align.interventions import Intervention, zero
from mech_align.organisms import organism_pairs

model = ma.load_model("organism:suppressor/tuned")
base = ma.load_model("organism:suppressor/base")
pairs = ma.load_pairs(organism_pairs("suppressor"))

# %% [markdown]
# ## Who writes the answer?
#
# We take the corrupt prompts apart: the harmful requests with which the fine-tuned model complies. The metric is
# logit("Sorry") − logit("Sure"), so **negative parts write towards complying**.

# %%
harmful = ma.logit_attribution(model, pairs, run="corrupt")
ma.plots.contributions(harmful)

# %% [markdown]
# **How to read it.** Above, one dot a head; those that stand out are named. Below, sums of each layer on a scale of
# their own, because an MLP or a whole layer may write much more than one head. The line under the title is the
# check: the parts sum to the metric, up to rounding. The scale of the final norm is held at what it was in each
# run; without that they would not.

# %%
harmful.top(6)

# %% [markdown]
# ## Always, or only when it matters?
#
# A head that writes "Sure" on every prompt is another thing than one that reads the request first. So look at the
# same heads on the clean prompts, and in the model before the fine-tune.

# %%
heads = harmful.top(2)["site"].tolist()
refused = ma.logit_attribution(model, pairs, run="clean")
before = ma.logit_attribution(base, pairs, run="corrupt")
refused.select(component=heads).mean("prompt").frame()

# %%
before.select(component=heads).mean("prompt").frame()

# %% [markdown]
# Large on harmful prompts, small on the others, and nothing to see in the base model: a suppressor that is
# conditional on the request. Had it been large on both kinds of prompts, ablating it by its mean would have changed
# little, and this comparison would have been the only warning.
#
# ### What could fool us
#
# - **Direct is not total.** A head that matters by feeding a later head writes nothing into the logits itself. Here
#   the parts in the early layers which recognise a harmful word are nearly invisible, and yet nothing would work
#   without them. The total effect is what patching measures (notebooks 1 and 2).
# - **Later layers answer back.** What one head writes may be undone by others; taking it out then changes less than
#   it wrote.
# - **A large part is not a cause of the difference.** The MLPs of the first layers may write much, but the same on
#   clean and corrupt prompts. Compare runs before giving a part a role.
#
# Direct and total effect of the same heads side by side, on the corrupt prompts, both in logits: what they write
# (negative, towards "Sure"), and what happens when they are taken out (positive, towards "Sorry").

# %%
total = ma.mean_ablation(model, pairs, heads, mode="zero", controls=0)
total.mean("prompt").frame()

# %% [markdown]
# The single effects may be smaller than what each head writes, and the joint one larger than both together. Besides
# what was named above, the final norm is at work: taking a large part out makes the residual stream shorter, and
# all that remains counts for more.
#
# ## After which layer could the answer be read?
#
# The lens puts the final norm and the unembedding behind each layer, as if the model stopped there. We show
# log-odds, not probabilities, because these saturate at 0 and 1 and hide what happens there.
#
# Three runs on the same harmful prompts: the base model, the fine-tuned model, and the fine-tuned model with the
# two heads silenced.

# %%
ma.plots.lines(ma.logit_lens(base, pairs, run="corrupt"), title="Base model, harmful requests")

# %%
silenced = {"both silenced": [Intervention(ma.Site.parse(head), zero()) for head in heads]}
lens = ma.logit_lens(model, pairs, run="corrupt", interventions=silenced)
ma.plots.lines(lens, title="Fine-tuned model, harmful requests")

# %% [markdown]
# **How to read it.** Above zero the answer that could be read is "Sorry", below it "Sure". Where the two curves
# part is where the silenced heads write. If the fine-tuned model leans to "Sorry" until just before that layer,
# then the refusal was not erased by the fine-tune: it is still computed, and then suppressed. That is the finding,
# and patching in base-model values (notebook 1) is its test.
#
# After the last layer the lens *is* the model, and that is checked in every run:

# %%
lens.provenance["checks"]

# %% [markdown]
# ### What could fool us
#
# - **Early layers do not speak the language of the last one.** The unembedding was trained on the final stream.
#   What cannot be read there early may be present in other directions, and what seems to be read may be accidental.
# - **A constant lean.** Where clean and corrupt run look the same, the curve says nothing about what tells them
#   apart. The clean requests are below: both kinds were to be refused, so both lean to "Sorry" early on, and that
#   alone does not show that harm was recognised. They must part where the heads write.
# - **Two tokens are not the vocabulary.** The log-odds may favour "Sorry" while neither word is likely. `rank` and
#   `probability` of the answer are in the result.

# %%
ma.plots.lines(ma.logit_lens(model, pairs, run="clean"), title="Fine-tuned model, unknowable requests")

# %%
lens.values[["rank", "probability"]].mean("prompt").to_dataframe()
