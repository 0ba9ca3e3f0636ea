"""The wire contracts of biphase: proto files, generated code, value types, ids, errors and conversions."""
