package mic

import (
	"os"
	"runtime/debug"
	"testing"

	"github.com/go-logr/logr"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	"k8s.io/klog/v2"
)

func TestMain(m *testing.M) {
	// One of the handlers limits its rate by the time of its last call. The fake clock starts in the year 2000, so the
	// time of a call outside a bubble is decades in the future, and the handler would sleep until then.
	utilruntime.ErrorHandlers = nil //nolint:reassign // the variable is there to be set
	klog.SetLogger(logr.Discard())  // thousands of lost connections
	debug.SetGCPercent(400)         // sequences are short, and most of their garbage is freed with them
	os.Exit(m.Run())
}
