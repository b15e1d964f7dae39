package telemetry

import (
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/podidentity/podidentity/internal/logging"
)

// Loggers write to one destination, each with its own level.
type Loggers struct {
	Main *zap.Logger
	// Audit has one record for each token request: of level info if the tokens were issued, and otherwise of level
	// warn.
	Audit *zap.Logger
}

// NewLoggers returns loggers that write lines of JSON to w, or of plain text if asText is true. An auditLevel above all
// levels in use disables the audit log. Call stop before the process ends: it writes the buffered lines.
func NewLoggers(w zapcore.WriteSyncer, level, auditLevel zapcore.Level, asText bool) (logs Loggers, stop func()) {
	buffered, stop := logging.Buffer(w)
	return Loggers{
		Main:  logging.NewLogger(buffered, level, asText),
		Audit: logging.NewLogger(buffered, auditLevel, asText).Named("audit"),
	}, stop
}

// CheckRequest returns the entry for the line of a request, or nil if the line is not logged. The line of a token
// request is an audit record if the audit level includes it, and otherwise a line of the main log.
func (l Loggers) CheckRequest(tokenRequest, issued bool) *zapcore.CheckedEntry {
	var entry *zapcore.CheckedEntry
	switch {
	case tokenRequest && issued:
		entry = l.Audit.Check(zap.InfoLevel, "token issued")
	case tokenRequest:
		entry = l.Audit.Check(zap.WarnLevel, "token refused")
	}
	if entry == nil {
		entry = l.Main.Check(zap.InfoLevel, "request")
	}
	return entry
}
