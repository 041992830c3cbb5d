# The package and its scripts, with the versions of constraints.txt.
#
#   docker build -t vilmedic .
#       with CUDA: the wheels bring its libraries; they run on CPUs too, and are some GB large
#   docker build -t vilmedic:cpu --build-arg TORCH_INDEX=<index> .
#       for CPUs alone: the index of wheels that PyTorch's installation page names for the platform CPU
#
#   docker run --rm --gpus all --shm-size 8g -v "$PWD/ckpt:/vilmedic/ckpt" -v /data/mine:/vilmedic/data/mine:ro \
#       vilmedic bin/train.py config/phantom/convirt.yml ...
#
# Not tested: the project is developed on a machine without a Docker daemon.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

# Of pyproject.toml's extras, separated by commas: dicom, wandb, mlflow, parquet, onnx, optuna, lora.
ARG EXTRAS=dicom
ARG TORCH_INDEX=

WORKDIR /vilmedic
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
# torch first and by itself: only it comes from the other index, and changes of the code keep the layer
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} $(grep -E '^torch(vision)?==' constraints.txt)
COPY vilmedic vilmedic
RUN pip install --no-cache-dir --constraint constraints.txt --editable ".[${EXTRAS}]"
COPY bin bin
COPY config config
COPY data data

# Model hubs are asked only when a configuration names one of their models.
ENV TOKENIZERS_PARALLELISM=false
VOLUME /vilmedic/ckpt
ENTRYPOINT ["python"]
CMD ["bin/train.py", "--help"]
