# The package and its scripts, with the versions of constraints.txt.
#
#   docker build -t vilmedic .
#       with CUDA: the wheels include its libraries, take some GB and also run on CPUs
#   docker build -t vilmedic:cpu --build-arg TORCH_INDEX=<index> .
#       for CPUs only: <index> is the wheel index on PyTorch's installation page for the platform CPU
#
#   docker run --rm --gpus all --shm-size 8g -v "$PWD/ckpt:/vilmedic/ckpt" -v /data/mine:/vilmedic/data/mine:ro \
#       vilmedic bin/train.py config/phantom/convirt.yml ...
#
# Not tested: the project is developed on a machine without a Docker daemon.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

# Extras from pyproject.toml, separated by commas: dicom, wandb, mlflow, parquet, onnx, optuna, lora.
ARG EXTRAS=dicom
ARG TORCH_INDEX=

WORKDIR /vilmedic
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
# torch is installed first: only it uses the other index, and code changes keep this layer cached
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} $(grep -E '^torch(vision)?==' constraints.txt)
COPY vilmedic vilmedic
RUN pip install --no-cache-dir --constraint constraints.txt --editable ".[${EXTRAS}]"
COPY bin bin
COPY config config
COPY data data

# Model hubs are contacted only if a configuration names one of their models.
ENV TOKENIZERS_PARALLELISM=false
VOLUME /vilmedic/ckpt
ENTRYPOINT ["python"]
CMD ["bin/train.py", "--help"]
