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
	// One of them remembers when it was last called: in faked time that can be 26 years in the future, and it waits.
	utilruntime.ErrorHandlers = nil
	klog.SetLogger(logr.Discard()) // lost connections, by the thousand
	debug.SetGCPercent(400)        // stories are short, and most of their garbage dies with them
	os.Exit(m.Run())
}
