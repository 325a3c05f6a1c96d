// What this library was built from, as a digest that setup.py gives: it builds again only where the digest differs.
extern "C" __attribute__((visibility("default"))) const char normpass_fingerprint[] = NORMPASS_FINGERPRINT;
