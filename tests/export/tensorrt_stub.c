/* What tensorrt.so imports from TensorRT's libraries: nine functions with C linkage (nm -D
 * --undefined-only), the same in every version from 10.13 to 11.4.
 *
 * They hand out one object, all of whose virtual methods are the same function, which returns that
 * object: a builder that makes networks that make layers, whatever is asked. So the real bindings
 * check the real calls, names, types and conversions, and nothing is built. The classes of the C++
 * API are a pointer to the implementation behind a table of methods, which is why one layout, a
 * table and then pointers to the object itself, serves as all of them.
 *
 * What is read back means nothing: pointers are never null, numbers positive, strings short, shapes
 * empty. Linux on x86-64. */
#define _GNU_SOURCE
#include <sys/mman.h>

enum { FIELDS = 32, METHODS = 1024 };
typedef struct {
    void* fields[FIELDS]; /* the table, then what a class derived from it keeps */
    void* table[2 + METHODS];
} Object;

/* Where it lies matters: low enough that its address is positive as a 32-bit number, with a last
 * byte that is true as a bool, and of bytes that are text, as the object's own beginning is read
 * for a string. */
#define HOME ((Object*)0x41414110)
#define PAGE ((void*)0x41414000)

extern void* _ZTIi; /* the type_info of int in libstdc++: no class that the bindings know */

static void* method(void** first) {
    if (first == (void**)HOME) return HOME;
    *first = 0; /* a structure is returned through memory whose address comes before `this` */
    return first;
}

__attribute__((constructor)) static void make(void) {
    Object* object = HOME;
    if (mmap(PAGE, sizeof(Object) + 0x1000, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) != PAGE)
        __builtin_trap();
    object->table[0] = 0; /* the offset to the whole object, which dynamic_cast<void*> adds */
    object->table[1] = &_ZTIi;
    for (int i = 0; i < METHODS; ++i) object->table[2 + i] = (void*)method;
    object->fields[0] = &object->table[2];
    for (int i = 1; i < FIELDS; ++i) object->fields[i] = object;
}

#define ENTRY(name) \
    void* name(void) { return HOME; }
ENTRY(createInferBuilder_INTERNAL)
ENTRY(createInferRefitter_INTERNAL)
ENTRY(createInferRuntime_INTERNAL)
ENTRY(createNvOnnxParser_INTERNAL)
ENTRY(createNvOnnxParserRefitter_INTERNAL)
ENTRY(getBuilderPluginRegistry)
ENTRY(getPluginRegistry)
ENTRY(initLibNvInferPlugins)
ENTRY(getNvOnnxParserVersion)
