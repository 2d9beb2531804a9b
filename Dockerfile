# docker build -t nnlite .                             with the CPU build of torch
# docker build -t nnlite --build-arg TORCH=cu128 .     with CUDA 12.8, for an NVIDIA GPU (also cu126, cu130, ...)
# docker run --rm -it --gpus all --user "$(id -u):$(id -g)" -v "$PWD:/work" nnlite plan DATA
FROM python:3.12-slim
ARG TORCH=cpu

# torch.compile needs a compiler; without one nnlite trains uncompiled.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/nnunet_lite
COPY pyproject.toml README.md LICENSE ./
COPY nnunet_lite nnunet_lite
COPY configs configs
RUN pip install --no-cache-dir uv \
    && uv pip install --system --no-cache --torch-backend "$TORCH" . \
    && nnlite --version

# With --user the process may have no home and no name, and libraries want both.
ENV HOME=/tmp USER=nnlite
WORKDIR /work
ENTRYPOINT ["nnlite"]
CMD ["--help"]
