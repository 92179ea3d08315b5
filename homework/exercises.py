"""The one table that the homework is made from: exercise → functions, lecture, texts, points.

`formula`: pieces of the functions' docstrings that hold the answer, and what stands there instead
with `make --formulas false`. Equations are LaTeX: the handout's Markdown holds them as they are,
its HTML as MathML.
"""
from typing import NamedTuple


class Exercise(NamedTuple):
    """What a student writes, and what the handout says of it."""
    number: int
    title: str
    functions: tuple[tuple[str, str], ...]      # (file, function or Class.method)
    slide: str                                  # lecture: topic
    points: int
    minutes: int
    idea: str                                   # what the slide says
    equations: tuple[str, ...]
    write: str                                  # what to write
    questions: tuple[str, str]                  # to be answered before anything is run
    command: str                                # answers them
    formula: tuple[tuple[str, str, str], ...] = ()   # (function, piece of its docstring, instead)
    hide: tuple[tuple[str, str, str], ...] = ()      # (file, function that would do the work, body)


CMU = "CMU 10-423/623, lecture 12: "
EXERCISES = (
    Exercise(
        1, "One shift and a mask",
        (("model.py", "before"), ("data/batches.py", "response_row"),
         ("data/tokenizer.py", "Tokenizer.render")),
        CMU + "instruction fine-tuning", 6, 20,
        "A chat is one long text. The model is trained on the assistant's words alone, and it "
        "predicts each word from those before it.",
        (r"p_\theta(x) = \prod_t p_\theta(x_t \mid x_{<t})",),
        "`render` turns a conversation into ids and a mask that is 1 on the assistant's text and "
        "on the end token after it: the template stands in the docstring of `data/tokenizer.py`; "
        "ChatML's branch, for published models, is not graded. `response_row` does the same for a "
        "prompt and a response that are ids already. `before` is the only shift of the whole "
        "project: the state that predicts token t stands at t − 1.",
        ("What would a model learn whose mask left out the end token?",
         "What loss would a model reach that read its prediction of token t from the state at t?"),
        "python -m data.show out/tinytown/data/sft.jsonl --tokenizer tinytown --block_size 128"),
    Exercise(
        2, "A mean over what counts", (("kernels.py", "masked_mean"),),
        CMU + "instruction fine-tuning", 4, 10,
        "Rows differ in length, so a batch holds padding. Every mean of the project is taken over "
        "the tokens that count, in the whole batch at once.",
        (r"\frac{\sum_{b,t} m_{bt}\, x_{bt}}{\sum_{b,t} m_{bt}}",),
        "`masked_mean`. Padding may hold anything, NaN too: it must reach neither the value nor "
        "the gradient. An empty mask gives 0.",
        ("Two rows have 1 and 9 tokens. What does a mean of row means do to the short one?",
         "Why is 0 · NaN not 0, and what follows for `mask * x`?"),
        "python -m homework check 2"),
    Exercise(
        3, "Log-probability of a token, and entropy", (("kernels.py", "token_logprobs_reference"),),
        CMU + "reinforcement learning with human feedback", 8, 20,
        "Everything that follows is computed from two numbers a token: how likely it was, and how "
        "undecided the model was.",
        (r"z = W h / \tau", r"\log p(x) = z_x - \log \sum_v e^{z_v}",
         r"H = -\sum_v p_v \log p_v"),
        "`token_logprobs_reference`, the definition: from hidden states, the output head, targets "
        "and a temperature. The kernel that the scripts use, `token_logprobs`, does not hold all "
        "logits at once; until you hand in it calls yours: slower, the same numbers.",
        ("At temperature 2, is log p(x) half of what it was?",
         "What is the entropy of a model that gives all V words the same probability?"),
        "python sample.py --init out/tinytown/sft --prompt \"Where does Ada live?\" "
        "--temperature 2",
        hide=(("kernels.py", "token_logprobs",
               "return token_logprobs_reference(hidden, weight, targets, temperature)"),)),
    Exercise(
        4, "Instruction tuning", (("train_sft.py", "sft_loss"),),
        CMU + "instruction fine-tuning", 4, 10,
        "Step 1 of RLHF: collect demonstrations, imitate them.",
        (r"L(\theta) = -\frac{1}{N} \sum_{t \in \text{response}} "
         r"\log \pi_\theta(x_t \mid x_{<t})",),
        "`sft_loss`, in nats a token, from log-probabilities and the mask.",
        ("What is the loss of a model that gives each of V words the same probability?",
         "Does a long answer weigh more than a short one? Should it?"),
        "python train_sft.py --preset tinytown --init out/tinytown/base "
        "--data out/tinytown/data/sft.jsonl --out out/mine/sft",
        (("sft_loss", ": −Σ mask·logprob / Σ mask", ""),)),
    Exercise(
        5, "The reward model, on all pairs of a ranking",
        (("train_rm.py", "pairwise_loss"), ("train_rm.py", "ranking_loss"),
         ("train_rm.py", "better_pairs")),
        CMU + "step 2, the objective of the reward model", 10, 40,
        "People rank K answers. The reward model learns to put a higher number on the better one "
        "of every two; all pairs of a prompt stay together.",
        (r"L(\theta) = -\frac{1}{|pairs|} \sum_{(w,l) \in pairs} "
         r"\log \sigma\left(r_\theta(x, y_w) - r_\theta(x, y_l)\right)",),
        "`pairwise_loss` of two rewards (with a margin), `better_pairs` that says who was ranked "
        "above whom, and `ranking_loss`: a mean over a prompt's pairs (C(K,2) of them without "
        "ties), then over prompts. Ties are no pair; prompts without a pair do not count; K < 2 is "
        "a ValueError; a margin may be one number for each prompt, (B, 1).",
        ("What is the loss at the start, when all rewards are 0?",
         "K = 9 has 36 pairs and K = 4 has 6. What happens if the loss is a mean over all pairs of "
         "the batch?"),
        "python train_rm.py --preset tinytown --init out/tinytown/sft "
        "--data out/tinytown/rank/rankings.jsonl --out out/mine/rm",
        (("pairwise_loss", ": −log σ(r_w − r_l − margin). In\n    nats.", ", in nats."),
         ("pairwise_loss", " Equal rewards give log 2, and adding a constant to both changes "
          "nothing: the\n    scale has no zero until a bias is set.", ""),
         ("ranking_loss",
          "    L = 1/B Σ_x 1/|pairs(x)| Σ_{i,j: score_i > score_j} −log σ(r_i − r_j)      "
          "(InstructGPT, eq. 1)\n\n", ""),
         ("ranking_loss", " Because of\n    the inner mean a ranking of 9 responses (36 pairs) "
          "weighs as much as one of 4 (6 pairs).", ""))),
    Exercise(
        6, "How far the policy went", (("train_ppo.py", "kl_estimates"),),
        CMU + "step 3, the objective of RL", 6, 15,
        "The policy must stay near the SFT model. How far it went is a KL divergence; from samples "
        "it can only be estimated.",
        (r"k_1 = \ell \qquad k_2 = \tfrac{1}{2}\ell^2 \qquad k_3 = e^{-\ell} - 1 + \ell",
         r"\ell = \log \pi(a) - \log \pi_{ref}(a)"),
        "`kl_estimates`: all three. Where two policies nearly agree, all digits of k3 as it is "
        "written above are lost; keep them.",
        ("KL is never negative. May k1 be?",
         "Two policies differ by a millionth. Why is exp(−ℓ) − 1 + ℓ, as written, wrong in float32?"
         ),
        "python sample.py --init out/tinytown/ppo --ref out/tinytown/sft "
        "--data out/tinytown/data/test.jsonl --count 5",
        (("kl_estimates", ", with ℓ = log π − log π_ref:\n\n"
          "        k1 = ℓ        k2 = ℓ²/2        k3 = exp(−ℓ) − 1 + ℓ\n\n", ".\n\n"),
         ("kl_estimates", "; k1 may be negative on a sample, k3 never", ""))),
    Exercise(
        7, "A reward for every token", (("train_ppo.py", "kl_penalized_rewards"),),
        CMU + "step 3, the objective of RL", 8, 25,
        "The reward model judges a whole answer; the penalty on KL is paid token by token. So the "
        "score lands on the last token, and each token pays its share.",
        (r"R_t = -\beta \left(\log \pi(a_t) - \log \pi_{ref}(a_t)\right) + 1[t = T]\; r(x, y)",),
        "`kl_penalized_rewards`. T is the last token of the response, not the last column.",
        ("What will KL do at β = 0?",
         "An answer has the score 0. Is that the same as an answer without a score?"),
        "python train_ppo.py --preset tinytown --init out/tinytown/sft --reward out/tinytown/rm "
        "--data out/tinytown/data/rl.jsonl --ptx_data out/tinytown/data/base.txt --beta 0 "
        "--out out/mine/no_kl",
        (("kl_penalized_rewards", ", R_t = −β(log π(a_t) − log π_ref(a_t)) + 1[t = last]·score. "
          "(B, T), 0\n    outside the mask.", ", (B, T), 0 outside the mask."),)),
    Exercise(
        8, "Advantages", (("train_ppo.py", "gae"),),
        CMU + "step 3, reinforcement learning", 12, 40,
        "Was a token better than expected? The value model says what was expected before it; GAE "
        "weighs what came after it.",
        (r"\delta_t = R_t + \gamma V_{t+1} - V_t",
         r"A_t = \delta_t + \gamma\lambda A_{t+1}", r"G_t = A_t + V_t"),
        "`gae`, backwards in time. V_t is the value before token t; after the last token it is 0.",
        ("With λ = 1 and γ = 1, what is A_t + V_t?",
         "Why must the value at the padding after a response never be read?"),
        "python -m homework check 8",
        (("gae", ": δ_t = R_t + γV_{t+1} − V_t, A_t = δ_t + γλA_{t+1}; returns\n"
          "    G_t = A_t + V_t", "; and returns"),
         ("gae", " λ = 1 gives Σ γ^k R_{t+k} − V_t, λ = 0 the TD error.", ""))),
    Exercise(
        9, "Whitening", (("train_ppo.py", "whiten"),),
        CMU + "step 3, reinforcement learning", 5, 10,
        "Rewards have no scale of their own. Advantages are brought to mean 0 and variance 1 in "
        "each batch.",
        (r"\hat{A} = \frac{A - \mu}{\sqrt{\sigma^2 + 10^{-8}}}",),
        "`whiten`: population variance, over the tokens that count; with shift_mean=False the mean "
        "is added back at the end.",
        ("What happens to a batch in which all advantages are equal?",
         "With shift_mean=False, what becomes of a reward of 0?"),
        "python -m homework check 9"),
    Exercise(
        10, "The clipped objective", (("train_ppo.py", "policy_loss"),),
        CMU + "step 3, PPO", 10, 30,
        "A batch of answers is used for several steps. The ratio says how far the policy has moved "
        "since it wrote them; beyond a range there is nothing more to gain.",
        (r"L = -\frac{1}{N}\sum_t \min\left(\rho_t A_t,\; "
         r"\operatorname{clip}(\rho_t, 1 - \varepsilon, 1 + \varepsilon) A_t\right)",
         r"\rho_t = \pi(a_t) / \pi_{old}(a_t)"),
        "`policy_loss`.",
        ("In the first step ρ is 1 everywhere. Is the gradient 0?",
         "A = 1 and ρ = 0.5: is the gradient cut off? And at A = −1?"),
        "python train_ppo.py --preset tinytown --init out/tinytown/sft --reward out/tinytown/rm "
        "--data out/tinytown/data/rl.jsonl --ptx_data out/tinytown/data/base.txt "
        "--out out/mine/ppo",
        (("policy_loss", ", −mean min(ρA, clip(ρ, 1−ε, 1+ε)A),", ","),
         ("policy_loss", " At ρ = 1 the loss is −mean(A), its gradient −A: not zero.\n"
          "    Clipping binds only where it lowers the objective: a token that moved the wrong way "
          "is always\n    pulled back.", ""))),
    Exercise(
        11, "The value loss", (("train_ppo.py", "value_loss"),), CMU + "step 3, PPO", 7, 20,
        "The value model learns what to expect; it, too, must not move far on one batch.",
        (r"L = \frac{1}{2N}\sum_t \max\left((V_t - G_t)^2,\; "
         r"(\operatorname{clip}(V_t, V^{old}_t \pm \varepsilon) - G_t)^2\right)",),
        "`value_loss`, with the ½.",
        ("Why is it a maximum here, and a minimum in exercise 10?",
         "Can clipping make this loss smaller?"),
        "python -m homework check 11",
        (("value_loss", ", ½ mean max((V − G)², (clip(V, V_old − ε, V_old + ε) − G)²), over "
          "response\n    tokens", ", over response tokens"),
         ("value_loss", " The larger error counts: clipping never makes the loss\n    smaller.",
          ""))),
    Exercise(
        12, "DPO", (("train_dpo.py", "dpo_loss"),),
        "Notes on instruction tuning: other ways than RL", 10, 25,
        "The policy that RL would reach is known up to a constant. Turned round, it gives the "
        "reward in terms of the policy; so rankings can be learned from without a reward model.",
        (r"h = \log \frac{\pi(y_w)}{\pi_{ref}(y_w)} - \log \frac{\pi(y_l)}{\pi_{ref}(y_l)}",
         r"L = -(1 - \varepsilon) \log \sigma(\beta h) - \varepsilon \log \sigma(-\beta h)"),
        "`dpo_loss`: losses, and the implicit rewards β log π/π_ref, without a gradient.",
        ("Policy and reference are the same. What is the loss, and is there a gradient?",
         "What is the loss for β → 0, and what does that do to learning?"),
        "python train_dpo.py --preset tinytown --init out/tinytown/sft "
        "--data out/tinytown/rank/rankings.jsonl --out out/mine/dpo",
        (("dpo_loss", " ε:\n\n        L = −(1 − ε) log σ(β h) − ε log σ(−β h),   "
          "h = (log π/π_ref)(y_w) − (log π/π_ref)(y_l)\n\n", " ε.\n\n"),
         ("dpo_loss", " With policy = reference\n    every loss is log 2, yet the gradient is not "
          "zero; β → 0 gives log 2 whatever the policy.", ""))),
    Exercise(
        13, "Best of n", (("systems/best_of_n.py", "best_of_n_kl"),
                          ("systems/best_of_n.py", "best_of_n_distribution")),
        "UVA CS 6501, chat-style instruction tuning: AlpacaFarm", 5, 20,
        "The simplest use of a reward model: draw n answers, keep the best. How far that is from "
        "the policy is known.",
        (r"\mathrm{KL} = \log n - \frac{n - 1}{n}",
         r"P(y) = \frac{p(y)}{P(r = r_y)}\left[P(r \le r_y)^n - P(r < r_y)^n\right]"),
        "`best_of_n_kl`, and `best_of_n_distribution` for a few responses that are all known.",
        ("How many nats does best-of-16 cost? PPO in this town costs about as much.",
         "Two answers have the same reward. Which of them is kept how often?"),
        "python -m systems.best_of_n --run out/tinytown",
        (("best_of_n_kl", " = log n − (n − 1)/n nats", " in nats"),
         ("best_of_n_distribution", ": P(y) = p(y)/P(r = r_y) · [P(r ≤ r_y)ⁿ −\n"
          "    P(r < r_y)ⁿ]", ""))),
    Exercise(
        14, "Who wins, and how sure that is", (("rollout.py", "win_rate"),),
        "Notes on instruction tuning: evaluation", 5, 15,
        "Policies are compared by the share of prompts on which one answer beats the other. A "
        "share without its error says little.",
        (r"\hat{w} = \frac{1}{n}\sum_i w_i", r"\mathrm{SE} = \frac{s}{\sqrt{n}}"),
        "`win_rate`: the mean over prompts of the share won, ties counted half, and its standard "
        "error. Several comparisons to one prompt are not independent, so n counts prompts, and s "
        "is the standard deviation of their shares, with n − 1.",
        ("600 prompts, a win rate of 0.55: is the policy better?",
         "Four baseline answers to each of 150 prompts: is that as good as 600 prompts?"),
        "python evaluate.py --run out/tinytown",
        (("win_rate", ", ties counted half; standard error over prompts,\n"
          "    std/√n with n − 1)", "; its standard error)"),)),
)
# Without blanks and without points of the machine: graded by hand.
FINALE = (
    "Reach the optimum, and explain the distance",
    "The optimum of RL with a KL penalty is known: π* ∝ π_ref·exp(r/β). On a vocabulary that can "
    "be enumerated, your functions can be held against it.",
    (r"\pi^*(y) \propto \pi_{ref}(y) \exp\left(r(y)/\beta\right)",),
    "The command runs PPO with your rewards, GAE, whitening and losses, from 16, 64 and 256 "
    "answers a step, and DPO with your loss on all pairs, in the proportions of Bradley and Terry; "
    "both on the 13 responses of at most two letters (letter 0 ends one). Run it for β = 0.3 and "
    "0.1, and with another `--lr`. On half a page: what moves with β, with the answers a step, "
    "with the learning rate; why does DPO get closer; what does whitening do when nothing is left "
    "to learn?",
    "python -m homework finale --beta 0.3")


def by_number(number: int) -> Exercise:
    """The exercise of a number; KeyError for another."""
    return {one.number: one for one in EXERCISES}[number]
