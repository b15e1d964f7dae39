package telemetry

import (
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/podidentity/podidentity/internal/logging"
)

// Loggers write to one destination, each with its own level.
type Loggers struct {
	Main *zap.Logger
	// Audit receives one record for each token request: at level info if the tokens were issued, and otherwise at level
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

// CheckRequest returns the entry for the line of a request, or nil if the line is not logged. For a token request the
// line is an audit record, unless auditLevel of NewLoggers excludes that record. All other lines go to the main log.
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
