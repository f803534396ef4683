# roe_jax and its programs, for TPUs by default.
#
#   docker build -t roe_jax .
#   docker build -t roe_jax --build-arg JAX="jax[cuda13]" .    # NVIDIA driver 580 or newer, else cuda12
#   docker build -t roe_jax --build-arg JAX=jax .              # CPUs
#   docker run --rm -it roe_jax                                # the quickstart
FROM python:3.12-slim

ARG JAX="jax[tpu]"

WORKDIR /src
COPY pyproject.toml setup.cfg README.md LICENSE ./
COPY roe_jax roe_jax
COPY checkpoints_convert checkpoints_convert
COPY experiments experiments
RUN pip install --no-cache-dir ".[experiments]" "$JAX"

RUN useradd --create-home --uid 1000 roe
USER roe
WORKDIR /home/roe
CMD ["python", "-m", "experiments.quickstart"]
