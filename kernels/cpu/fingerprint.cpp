// What this library was built from: a digest that setup.py gives, which builds again only where it differs; and the names
// of the activations in the order of their codes, which whoever loads it compares with its own.
#include "math.h"
#include "../include/activation.h"

#define NORMPASS_VISIBLE extern "C" __attribute__((visibility("default")))
#define NORMPASS_NAME(CODE, NAME, TYPE) " " #NAME

NORMPASS_VISIBLE const char normpass_fingerprint[] = NORMPASS_FINGERPRINT;

NORMPASS_VISIBLE const char* normpass_activations() { return NORMPASS_FOR_EACH_ACTIVATION(NORMPASS_NAME); }
