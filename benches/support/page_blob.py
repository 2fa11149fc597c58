"""A disk as somebody would script it: nbdkit's Python plugin and Azure's SDK.

No lease, no fence, no retry but the SDK's own. BLOB_URL and AZURE_STORAGE_KEY
say which page blob, BLOB_ACCOUNT whose.
"""

import os

import nbdkit
from azure.storage.blob import BlobClient

API_VERSION = 2

blob = BlobClient.from_blob_url(
    os.environ["BLOB_URL"],
    credential={
        "account_name": os.environ["BLOB_ACCOUNT"],
        "account_key": os.environ["AZURE_STORAGE_KEY"],
    },
)


def thread_model():
    return nbdkit.THREAD_MODEL_PARALLEL


def open(readonly):
    return blob


def get_size(blob):
    # A VHD's last page is its footer.
    return blob.get_blob_properties().size - 512


def pread(blob, buffer, offset, flags):
    buffer[:] = blob.download_blob(offset=offset, length=len(buffer)).readall()


def pwrite(blob, buffer, offset, flags):
    blob.upload_page(bytes(buffer), offset=offset, length=len(buffer))


def can_flush(blob):
    return True


def flush(blob, flags):
    """A page that was put is durable."""
