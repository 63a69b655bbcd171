/* chexnet-deploy's runtime in C, for a console's own process: a verified bundle in, a radiograph's findings out.

   Copy chexnet.h and chexnet.c. Needs POSIX, zlib, libcrypto of OpenSSL 3, and a backend:

       cc -O2 -std=c11 -DCHEXNET_OPENVINO -c chexnet.c       links with -lopenvino_c -lcrypto -lz -lm
       cc -O2 -std=c11 -DCHEXNET_ONNXRUNTIME -c chexnet.c    links with -lonnxruntime -lcrypto -lz -lm

   It refuses what the Python runtime refuses, in the same order, and computes the same pixels. It reads no image files: whoever
   reads a DICOM file also checks that its header is in the bundle's scope. */
#ifndef CHEXNET_H
#define CHEXNET_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CHEXNET_MESSAGE_BYTES 512

/* What a call returns; all but CHEXNET_OK leave one line in `message`: found, needed, next step. */
enum chexnet_status {
  CHEXNET_OK = 0,
  CHEXNET_BUNDLE_ERROR,  /* the files are not what was exported */
  CHEXNET_TRUST_ERROR,   /* nobody trusted has signed the bundle, it is too old, or the trust can't be used */
  CHEXNET_SESSION_ERROR, /* the backend refuses the model, answers otherwise than when the bundle was made, or failed */
  CHEXNET_IMAGE_ERROR    /* this picture is not what the network is for; go on with the next */
};

/* What the manifest says. Strings are UTF-8. */
typedef struct {
  char id[65];              /* SHA-256 of manifest.json; names the bundle */
  int side_px;              /* S: the network takes uint8 [1, 1, S, S] */
  int n_findings;           /* C */
  const char *const *findings;
  const double *operating_points; /* probability from which a finding is called present; negative where it has none */
  const char *dialect;            /* "float", or the form of int8 */
} chexnet_model;

/* What runs the network. One call at a time. */
typedef struct {
  const char *file; /* what it loads: "model.onnx" or "model.plan" */
  /* Load the bytes, which are verified, and free() them, soon, as they are many; threads is 1 or more. Return 0, or leave a message. */
  int (*open)(const chexnet_model *model, void *bytes, size_t n_bytes, int threads, void **session, char *message);
  /* pixels uint8 [1, 1, S, S] -> logits float [1, C] and maps float [1, C, S/32, S/32]. Return 0, or leave a message. */
  int (*run)(void *session, const uint8_t *pixels, float *logits, float *maps, char *message);
  void (*close)(void *session); /* called once, also after a failed open if *session was set */
} chexnet_backend;

extern const chexnet_backend chexnet_openvino;    /* with -DCHEXNET_OPENVINO */
extern const chexnet_backend chexnet_onnxruntime; /* with -DCHEXNET_ONNXRUNTIME; sets ORT_DISABLE_TELEMETRY */

typedef struct {
  const char *name;
  const char *public_key; /* the middle line of the PEM that `openssl pkey -pubout` writes: Ed25519 */
  int is_revoked;
} chexnet_key;

/* What a bundle must show to be opened here; the fields of the Python runtime's trust file. */
typedef struct {
  const chexnet_key *keys; /* 1 to 64 */
  int n_keys;
  const char *line;       /* the model line that may run; NULL for any */
  int32_t min_release;    /* the oldest release that may run; 0 for any */
  const char *floor_file; /* remembers the newest release that has run here, and is raised; NULL for none */
} chexnet_trust;

typedef struct chexnet chexnet; /* an open bundle; used by one thread at a time, fork not survived */

/* Findings of one radiograph, in the order of chexnet_model.findings; they belong to the handle until its next call. */
typedef struct {
  const float *logits;        /* [C] */
  const float *probabilities; /* [C], 0..1 */
  const signed char *present; /* [C]: 1 at and above the operating point, 0 below it, -1 without one */
  const float *maps;          /* [C, S/32, S/32] class activation maps in logits; mean over space + head bias = logit */
} chexnet_prediction;

/* Verify a bundle's every byte, load it and check its known answers; then make its release the oldest that runs here, where
   trust has a floor file. trust NULL checks hashes alone. threads: CPU threads, 0 for all cores. message may be NULL. */
int chexnet_open(const char *path, const chexnet_trust *trust, const chexnet_backend *backend, int threads, chexnet **bundle,
                 char *message);

const chexnet_model *chexnet_get_model(const chexnet *bundle);

/* Predict one gray picture: uint8 [height, width], rows one after the other, bone bright. A refusal's message begins with its
   reason and a colon, e.g. "blank: ". */
int chexnet_predict(chexnet *bundle, const uint8_t *gray, int height, int width, chexnet_prediction *prediction,
                    char *message);

void chexnet_close(chexnet *bundle); /* NULL is taken */

/* The model's pixels of a picture: uint8 [side_px, side_px], bytes as the Python runtime's Preprocessing makes them. */
int chexnet_resize(const uint8_t *gray, int height, int width, int side_px, uint8_t *pixels,
                   char *message);

#ifdef __cplusplus
}
#endif
#endif
