# syntax=docker/dockerfile:1
# whet-server, CPU by default. For CUDA:
#   docker build --build-arg DEVICE=cuda .
# On amd64 the registry's plain torch wheel is the CUDA build, which also runs on a CPU; DEVICE=cpu asks for the CPU
# build and needs an index that has it:
#   docker build --build-arg TORCH_INDEX_URL=<index with CPU wheels of torch> .
ARG PYTHON_VERSION=3.12

FROM python:${PYTHON_VERSION}-slim-bookworm AS build
ARG DEVICE=cpu
ARG TORCH_INDEX_URL=
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential git \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml setup.py constraints.txt Makefile README.md ./
COPY client client
COPY engine engine
COPY server server
# The same target that a user runs without a container.
RUN make install VENV=/opt/whet DEVICE="${DEVICE}" TORCH_INDEX_URL="${TORCH_INDEX_URL}"

FROM python:${PYTHON_VERSION}-slim-bookworm AS serve
LABEL org.opencontainers.image.title="whet-server" \
      org.opencontainers.image.description="One service to serve, fine-tune, quantize, evaluate and embed with language models"
# A numeric id, so that Kubernetes can verify runAsNonRoot.
RUN groupadd --gid 10001 whet && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/whet whet \
    && install -d -o 10001 -g 10001 /var/lib/whet
COPY --from=build /opt/whet /opt/whet
# The root file system may be read-only: only the state directory and /tmp are written.
ENV PATH=/opt/whet/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/var/lib/whet \
    WHET_HOST=0.0.0.0 \
    WHET_STATE_DIR=/var/lib/whet
USER 10001:10001
WORKDIR /var/lib/whet
VOLUME ["/var/lib/whet", "/tmp"]
EXPOSE 50051 9090
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:9090/livez', timeout=2)"]
ENTRYPOINT ["whet-server"]
