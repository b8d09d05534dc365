"""Where metrics were published."""

from __future__ import annotations

from ...registry import Source

# fmt: off
CARLINI = Source("Extracting Training Data from Large Language Models", "https://arxiv.org/abs/2012.07805", 2021)
CONTAINS = Source("Lost in the Middle: How Language Models Use Long Contexts", "https://arxiv.org/abs/2307.03172", 2023)
DISTINCT = Source("A Diversity-Promoting Objective Function for Neural Conversation Models", "https://arxiv.org/abs/1510.03055", 2016)
JANG = Source("Knowledge Unlearning for Mitigating Privacy Risks in Language Models", "https://arxiv.org/abs/2210.01504", 2023)
LEAK = Source("Leak@k: Unlearning Does Not Make LLMs Forget Under Probabilistic Decoding", "https://arxiv.org/abs/2511.04934", 2025)
LOSS = Source("Privacy Risk in Machine Learning: Analyzing the Connection to Overfitting", "https://arxiv.org/abs/1709.01604", 2018)
MEMORIZATION = Source(
    "Memorization Without Overfitting: Analyzing the Training Dynamics of Large Language Models",
    "https://arxiv.org/abs/2205.10770", 2022,
)
FORGET_VECTOR = Source(
    "Forget Vectors at Play: Universal Input Perturbations Driving Machine Unlearning in Image Classification",
    "https://arxiv.org/abs/2412.16780", 2024,
)
SPARSITY = Source("Model Sparsity Can Simplify Machine Unlearning", "https://arxiv.org/abs/2304.04934", 2023)
MIN_K = Source("Detecting Pretraining Data from Large Language Models", "https://arxiv.org/abs/2310.16789", 2024)
MIN_K_PLUS = Source(
    "Min-K%++: Improved Baseline for Detecting Pre-Training Data from Large Language Models",
    "https://arxiv.org/abs/2404.02936", 2025,
)
MUSE = Source("MUSE: Machine Unlearning Six-Way Evaluation for Language Models", "https://arxiv.org/abs/2407.06460", 2025)
OPEN_UNLEARNING = Source(
    "OpenUnlearning: Accelerating LLM Unlearning via Unified Benchmarking of Methods and Metrics",
    "https://arxiv.org/abs/2506.12618", 2025,
)
PARSES = Source("Evaluating Large Language Models Trained on Code", "https://arxiv.org/abs/2107.03374", 2021)
REPETITION = Source("Neural Text Generation with Unlikelihood Training", "https://arxiv.org/abs/1908.04319", 2020)
ROUGE = Source("ROUGE: A Package for Automatic Evaluation of Summaries", "https://aclanthology.org/W04-1013/", 2004)
TOFU = Source("TOFU: A Task of Fictitious Unlearning for LLMs", "https://arxiv.org/abs/2401.06121", 2024)
UDS = Source("Measuring the Depth of LLM Unlearning via Activation Patching", "https://arxiv.org/abs/2605.24614", 2026)
UWC = Source("Towards Effective Evaluations and Comparisons for LLM Unlearning Methods", "https://arxiv.org/abs/2406.09179", 2025)
WMDP = Source("The WMDP Benchmark: Measuring and Reducing Malicious Use With Unlearning", "https://arxiv.org/abs/2403.03218", 2024)
# fmt: on
