/* What a console does: open a bundle once, predict pictures, close.

       embed BUNDLE PICTURE.pgm... [--key PUBLIC_KEY]

   A picture is a binary PGM of 8 bits and stands for the pixels that a console has in memory. With --key the bundle needs that
   key's signature. Exit 0 where all were predicted, 1 where a picture was refused, 2 where the bundle was. */
#include "chexnet.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef CHEXNET_OPENVINO
#define BACKEND chexnet_openvino
#else
#define BACKEND chexnet_onnxruntime
#endif

static uint8_t *read_pgm(const char *path, int *height, int *width) {
  FILE *file = fopen(path, "rb");
  int most = 0;
  uint8_t *gray = NULL;
  if (file && fscanf(file, "P5 %d %d %d", width, height, &most) == 3 && fgetc(file) != EOF && most == 255 && *width > 0 &&
      *height > 0 && *width <= 65535 && *height <= 65535) {
    size_t size = (size_t)*width * (size_t)*height;
    gray = malloc(size);
    if (gray && fread(gray, 1, size, file) != size) {
      free(gray);
      gray = NULL;
    }
  }
  if (file) fclose(file);
  return gray;
}

int main(int count, char **arguments) {
  char message[CHEXNET_MESSAGE_BYTES];
  chexnet_key key = {"release", NULL, 0};
  chexnet_trust trust = {&key, 1, NULL, 0, NULL};
  chexnet *bundle;
  int status, failed = 0;
  if (count > 3 && strcmp(arguments[count - 2], "--key") == 0) {
    key.public_key = arguments[count - 1];
    count -= 2;
  }
  if (count < 3) {
    fprintf(stderr, "needed: embed BUNDLE PICTURE.pgm... [--key PUBLIC_KEY]\n");
    return 2;
  }
  status = chexnet_open(arguments[1], key.public_key ? &trust : NULL, &BACKEND, 0, &bundle, message);
  if (status != CHEXNET_OK) { /* there is nothing to call: show it, and take the machine out of service */
    fprintf(stderr, "%s\n", message);
    return 2;
  }
  const chexnet_model *model = chexnet_get_model(bundle);
  for (int i = 2; i < count; i++) {
    chexnet_prediction found;
    int height = 0, width = 0;
    uint8_t *gray = read_pgm(arguments[i], &height, &width);
    status = chexnet_predict(bundle, gray, height, width, &found, message);
    free(gray);
    if (status != CHEXNET_OK) {
      fprintf(stderr, "%s: %s\n", arguments[i], message);
      failed = 1;
      continue;
    }
    printf("%s\n", arguments[i]);
    for (int c = 0; c < model->n_findings; c++)
      printf("  %-20s %.4f%s\n", model->findings[c], found.probabilities[c], found.present[c] == 1 ? " present" : "");
  }
  chexnet_close(bundle);
  return failed;
}
