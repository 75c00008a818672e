# hadolint global ignore=DL3008
# The packages of the base image's distribution are those of the day: DL3008 would pin each.
# A container that chats with a trained model, and can train one. compose.yaml starts it, docs/container.md says more.
#
#   docker build -t nanochat .       # for NVIDIA GPUs; PyTorch's packages bring CUDA's libraries, the base image has none
#   docker build -t nanochat-cpu --build-arg BASE=ubuntu:24.04 \
#       --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04

# --- Python, and the C compiler with which Triton makes the launchers of its kernels at run time ---
# hadolint ignore=DL3006
FROM ${BASE} AS system
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev python3 python3-dev \
    && rm -rf /var/lib/apt/lists/*
ARG TORCH_INDEX=pypi
# as part of the environment, since runs/setup.sh asks whether it was set up with the same one
ENV TORCH_INDEX=${TORCH_INDEX}
WORKDIR /nanochat

# --- the locked packages and the tokenizer's crate; Rust and the caches stay in this stage ---
FROM system AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends curl python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml requirements.lock ./
COPY runs/setup.sh runs/
COPY rustbpe rustbpe
RUN UV_COMPILE_BYTECODE=1 bash runs/setup.sh

# --- what runs, as a user without rights ---
FROM system
RUN install -d -o 1000 -g 1000 /nanochat /data
COPY --from=build /nanochat/.venv .venv
COPY --chown=1000:1000 . .
ENV NANOCHAT_BASE_DIR=/data HOME=/data USER=nanochat \
    VIRTUAL_ENV=/nanochat/.venv PATH=/nanochat/.venv/bin:${PATH} PYTHONUNBUFFERED=1
USER 1000:1000
VOLUME /data
EXPOSE 8000
HEALTHCHECK --start-period=120s --interval=30s --timeout=5s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health')"]
CMD ["python", "-m", "scripts.chat_web", "--host", "0.0.0.0"]
