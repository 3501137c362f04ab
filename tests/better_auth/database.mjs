// Stands for your own database: users, sessions and keys in memory, gone when the process ends.
import { memoryAdapter } from "better-auth/adapters/memory";

export const database = memoryAdapter({ user: [], session: [], account: [], verification: [], jwks: [] });
